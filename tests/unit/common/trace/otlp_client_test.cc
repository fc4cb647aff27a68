#include "common/trace/otlp_client.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/trace/otlp_wire.h"
#include "tests/support/otlp_collector.h"

namespace tandem {
namespace {

constexpr double kSeconds = 30;  // long enough on any machine

TraceContext Parent() {
  return ParseTraceparent("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
}

// `count` spans of one request.
std::vector<Span> Spans(size_t count) {
  std::vector<Span> spans;
  for (size_t i = 0; i < count; ++i) {
    TraceContext context = Parent();
    context.span = i + 1;
    spans.push_back({.name = "s",
                     .context = context,
                     .parent = Parent().span,
                     .start = absl::UnixEpoch(),
                     .end = absl::UnixEpoch()});
  }
  return spans;
}

class OtlpClientTest : public testing::Test {
 protected:
  OtlpOptions Options() const {
    OtlpOptions options;
    options.endpoint = collector_->address();
    options.resource = {{"service.name", "tandem_test"}, {"service.instance.id", "t-0"}};
    options.backoff = absl::Milliseconds(10);
    return options;
  }
  double Dropped(const std::string& reason) {
    return metrics_
        .Counter("tandem_trace_spans_dropped_total",
                 "Spans lost: there was no room for them, or the collector did not take them; with "
                 "--otlp-endpoint only",
                 {{"reason", reason}})
        .Value();
  }
  bool WaitForSpans(size_t count) {
    return collector_->WaitFor(
        "", [count](const auto& spans) { return spans.size() >= count; }, kSeconds);
  }
  bool WaitForCalls(int count) {
    return collector_->WaitFor(
        "", [&](const auto& /*spans*/) { return collector_->calls() >= count; }, kSeconds);
  }

  Metrics metrics_;
  std::unique_ptr<OtlpCollector> collector_ = OtlpCollector::Start();
};

TEST_F(OtlpClientTest, SaysAllOfASpan) {
  ASSERT_NE(collector_, nullptr);
  OtlpClient client(Options(), &metrics_);
  Span span;
  span.name = "kv_transfer";
  span.kind = SpanKind::kClient;
  span.context = Parent();
  span.context.span = 0x0102030405060708;
  span.parent = Parent().span;
  span.start = absl::FromUnixMillis(1'500);
  span.end = absl::FromUnixMillis(2'750);
  span.code = absl::StatusCode::kUnavailable;
  span.attributes = {{"transport", "shm"}, {"kv_bytes", int64_t{1} << 40}, {"ms", 0.5}};
  client.Add({span});
  ASSERT_TRUE(WaitForSpans(1));
  const CollectedSpan got = collector_->spans().front();
  EXPECT_EQ(got.service, "tandem_test");
  EXPECT_EQ(got.instance, "t-0");
  EXPECT_EQ(got.name, "kv_transfer");
  EXPECT_EQ(got.trace, "0af7651916cd43dd8448eb211c80319c");
  EXPECT_EQ(got.id, "0102030405060708");
  EXPECT_EQ(got.parent, "b7ad6b7169203331");
  EXPECT_EQ(got.kind, opentelemetry::proto::trace::v1::Span::SPAN_KIND_CLIENT);
  EXPECT_DOUBLE_EQ(got.start, 1.5);
  EXPECT_DOUBLE_EQ(got.end, 2.75);
  EXPECT_TRUE(got.error);
  EXPECT_THAT(got.attributes,
              testing::UnorderedElementsAre(testing::Pair("transport", "shm"),
                                            testing::Pair("kv_bytes", "1099511627776"),
                                            testing::Pair("ms", "0.500000")));
}

// The protocol files here are cut from the standard's: a slip in them would be read back by the
// same slip. These bytes are what opentelemetry-proto 1.45.2 (PyPI) makes of the same span.
TEST(OtlpWireTest, IsTheStandards) {
  Span span = Spans(1)[0];
  span.kind = SpanKind::kServer;
  span.start = absl::FromUnixNanos(0x0102030405060708);
  span.end = absl::FromUnixNanos(0x0102030405060709);
  span.code = absl::StatusCode::kInternal;
  span.attributes = {{"a", "b"}, {"c", int64_t{3}}, {"d", 1.5}};
  const std::string bytes = SpansToProto({{"service.name", "x"}}, {&span, 1}).SerializeAsString();
  EXPECT_EQ(
      absl::BytesToHexString(bytes),
      "0a93010a150a130a0c736572766963652e6e616d6512030a0178127a0a080a0674616e64656d126e0a100af7"
      "651916cd43dd8448eb211c80319c120800000000000000012208b7ad6b71692033312a017330023908070605"
      "040302014109070605040302014a080a016112030a01624a070a0163120218034a0e0a016412092100000000"
      "0000f83f7a0c1208494e5445524e414c1802");
}

TEST_F(OtlpClientTest, SendsInBatches) {
  ASSERT_NE(collector_, nullptr);
  OtlpOptions options = Options();
  options.batch = 100;
  options.delay = absl::Hours(1);  // only what is full goes
  std::optional<OtlpClient> client(std::in_place, options, &metrics_);
  for (int i = 0; i < 25; ++i) client->Add(Spans(10));
  ASSERT_TRUE(WaitForSpans(200));
  EXPECT_EQ(collector_->largest(), 100u);
  client.reset();  // the rest goes with it
  EXPECT_EQ(collector_->spans().size(), 250u);
  EXPECT_EQ(Dropped("no_room") + Dropped("not_taken"), 0);
}

TEST_F(OtlpClientTest, TriesAgainAndThenGivesUp) {
  ASSERT_NE(collector_, nullptr);
  OtlpOptions options = Options();
  options.delay = absl::ZeroDuration();
  collector_->Answer({grpc::StatusCode::UNAVAILABLE, "not yet"});
  OtlpClient client(options, &metrics_);
  client.Add(Spans(3));
  ASSERT_TRUE(WaitForCalls(options.tries));
  collector_->Answer(grpc::Status::OK);
  client.Add(Spans(1));
  ASSERT_TRUE(WaitForSpans(1));
  EXPECT_EQ(collector_->calls(), options.tries + 1);
  EXPECT_EQ(Dropped("not_taken"), 3);

  // What would be refused again is not sent again.
  collector_->Answer({grpc::StatusCode::INVALID_ARGUMENT, "never"});
  client.Add(Spans(5));
  ASSERT_TRUE(WaitForCalls(options.tries + 2));
  collector_->Answer(grpc::Status::OK);
  client.Add(Spans(1));
  ASSERT_TRUE(WaitForSpans(2));
  EXPECT_EQ(collector_->calls(), options.tries + 3);
  EXPECT_EQ(Dropped("not_taken"), 8);
}

TEST_F(OtlpClientTest, ACollectorThatIsNotThereCostsABoundedNumberOfSpans) {
  ASSERT_NE(collector_, nullptr);
  OtlpOptions options = Options();
  collector_.reset();
  options.max_waiting = 100;
  options.batch = 10;
  options.backoff = absl::Hours(1);
  {
    OtlpClient client(options, &metrics_);
    for (int i = 0; i < 1000; ++i) client.Add(Spans(10));
    // At most one batch is on its way.
    EXPECT_GE(Dropped("no_room"), 1000 * 10 - 100 - 10);
  }
  // It ends at once, and every span is accounted for.
  EXPECT_EQ(Dropped("no_room") + Dropped("not_taken"), 1000 * 10);
}

TEST_F(OtlpClientTest, WithoutAnEndpointThereIsNone) {
  EXPECT_EQ(StartTracing({}, "tandem_test", "t-0", &metrics_), nullptr);
  EXPECT_TRUE(metrics_.Collect().empty());
}

}  // namespace
}  // namespace tandem
