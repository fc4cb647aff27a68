#include "common/base/trace.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/fakes/recorded_spans.h"

namespace tandem {
namespace {

constexpr char kGiven[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

TEST(TraceparentTest, ReadsAndWritesWhatW3cSays) {
  const TraceContext context = ParseTraceparent(kGiven);
  EXPECT_EQ(context.trace.ToHex(), "0af7651916cd43dd8448eb211c80319c");
  EXPECT_EQ(context.span, 0xb7ad6b7169203331u);
  EXPECT_TRUE(context.sampled);
  EXPECT_EQ(Traceparent(context), kGiven);

  std::string unsampled = kGiven;
  unsampled.back() = '0';
  EXPECT_TRUE(ParseTraceparent(unsampled).valid());
  EXPECT_FALSE(ParseTraceparent(unsampled).sampled);
  EXPECT_EQ(Traceparent(ParseTraceparent(unsampled)), unsampled);
  // Flags that mean something to others.
  unsampled[53] = 'f';
  unsampled[54] = 'e';
  EXPECT_TRUE(ParseTraceparent(unsampled).valid());
  EXPECT_FALSE(ParseTraceparent(unsampled).sampled);
}

TEST(TraceparentTest, ALaterVersionMaySayMore) {
  std::string later = kGiven;
  later[1] = '1';
  EXPECT_EQ(ParseTraceparent(later), ParseTraceparent(kGiven));
  EXPECT_EQ(ParseTraceparent(later + "-more"), ParseTraceparent(kGiven));
  EXPECT_FALSE(ParseTraceparent(later + "more").valid());
}

TEST(TraceparentTest, TakesNothingElse) {
  const std::string given = kGiven;
  std::vector<std::string> wrong = {
      "",
      "00",
      given.substr(0, 54),
      given + "-more",  // not of version 0
      given + "0",
      "ff" + given.substr(2),
      "00-00000000000000000000000000000000-b7ad6b7169203331-01",
      "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
      "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
      "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
      "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333g-01",
      "0x-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
  };
  for (const size_t dash : {2, 35, 52}) {
    wrong.push_back(given);
    wrong.back()[dash] = '_';
  }
  for (const std::string& text : wrong) EXPECT_FALSE(ParseTraceparent(text).valid()) << text;
}

TEST(TracestateTest, IsHandedOnAsItIs) {
  std::string many = "k0=v";
  for (int i = 1; i < 32; ++i) many += fmt::format(",k{}=v", i);
  for (const std::string& good :
       {std::string("congo=t61rcWkgMzE"), std::string("rojo=00f067aa0ba902b7, congo=t61 rcWkgMzE"),
        std::string("fw529a3039@dt=FfAI:x~!,0a_-*/=1"), std::string(",a=1,, b=2 ,"), many,
        std::string(255, 'k') + "=" + std::string(256, 'v')}) {
    EXPECT_EQ(ParseTracestate(good), good);
  }
}

TEST(TracestateTest, TakesNothingElse) {
  std::string many = "k0=v";
  for (int i = 1; i < 33; ++i) many += fmt::format(",k{}=v", i);
  for (const std::string& wrong :
       {std::string(), std::string(" , "), std::string("a"), std::string("a="), std::string("=a"),
        std::string("A=1"), std::string("_a=1"), std::string("a=1=2"), std::string("a=1,a=2"),
        std::string("a=1,b"), std::string("a\0=1", 4), std::string("a=\x80"), std::string("a=1\n"),
        std::string("a=1,\tb=2"), std::string("a =1"), many, std::string(257, 'k') + "=v",
        "k=" + std::string(257, 'v'),
        "k=" + std::string(256, 'v') + ",l=" + std::string(252, 'v')}) {
    EXPECT_EQ(ParseTracestate(wrong), "") << wrong;
  }
}

TEST(SampleTraceTest, TakesItsPartOfThem) {
  int taken = 0;
  for (int i = 0; i < 2000; ++i) {
    const TraceContext context = SampleTrace(0.25);
    EXPECT_EQ(context.valid(), context.sampled);
    taken += context.sampled;
  }
  // Ten standard deviations.
  EXPECT_NEAR(taken, 500, 194);
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(SampleTrace(1).sampled);
    EXPECT_FALSE(SampleTrace(0).valid());
  }
}

TEST(RequestTraceTest, IsThereForWhatIsSampledOnly) {
  RecordedSpans spans;
  TraceContext parent = ParseTraceparent(kGiven);
  EXPECT_EQ(RequestTrace::Begin(nullptr, parent, "r", absl::UnixEpoch()), nullptr);
  EXPECT_EQ(RequestTrace::Begin(&spans, {}, "r", absl::UnixEpoch()), nullptr);
  EXPECT_NE(RequestTrace::Begin(&spans, parent, "r", absl::UnixEpoch()), nullptr);
  parent.sampled = false;
  EXPECT_EQ(RequestTrace::Begin(&spans, parent, "r", absl::UnixEpoch()), nullptr);
}

TEST(RequestTraceTest, EveryStageAndCallIsBelowTheRequest) {
  RecordedSpans spans;
  const TraceContext parent = ParseTraceparent(kGiven);
  const absl::Time t = absl::UnixEpoch();
  const auto trace = RequestTrace::Begin(&spans, parent, "r", t);
  const TraceContext call = trace->NewCall();
  trace->Add("stage", t, t + absl::Seconds(1));
  trace->AddCall(call, "call", t, t + absl::Seconds(2), {{"worker", "w"}},
                 absl::StatusCode::kUnavailable);
  EXPECT_TRUE(spans.traces.empty());
  trace->End(t + absl::Seconds(3), absl::StatusCode::kOk, {{"tokens", int64_t{7}}});
  ASSERT_EQ(spans.traces.size(), 1u);
  ASSERT_EQ(spans.traces[0].size(), 3u);
  const Span& stage = spans.traces[0][0];
  const Span& called = spans.traces[0][1];
  const Span& request = spans.traces[0][2];
  EXPECT_EQ(request.name, "r");
  EXPECT_EQ(request.kind, SpanKind::kServer);
  EXPECT_EQ(request.parent, parent.span);
  EXPECT_EQ(request.end - request.start, absl::Seconds(3));
  EXPECT_EQ(request.attributes, (LogFields{{"tokens", int64_t{7}}}));
  EXPECT_EQ(stage.parent, request.context.span);
  EXPECT_EQ(stage.kind, SpanKind::kInternal);
  EXPECT_EQ(called.parent, request.context.span);
  EXPECT_EQ(called.context, call);
  EXPECT_EQ(called.kind, SpanKind::kClient);
  EXPECT_EQ(called.code, absl::StatusCode::kUnavailable);
  std::set<uint64_t> ids = {parent.span};
  for (const Span& span : spans.traces[0]) {
    EXPECT_EQ(span.context.trace, parent.trace);
    EXPECT_TRUE(ids.insert(span.context.span).second);
  }
}

TEST(RequestTraceTest, IsBounded) {
  RecordedSpans spans;
  const absl::Time t = absl::UnixEpoch();
  const auto trace = RequestTrace::Begin(&spans, ParseTraceparent(kGiven), "r", t);
  for (int i = 0; i < 1000; ++i) trace->Add("preempted", t, t);
  trace->End(t, absl::StatusCode::kOk, {});
  ASSERT_EQ(spans.traces.size(), 1u);
  EXPECT_EQ(spans.traces[0].size(), RequestTrace::kMaxSpans);
  EXPECT_EQ(spans.traces[0].back().name, "r");
}

}  // namespace
}  // namespace tandem
