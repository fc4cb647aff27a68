// The spans of whole requests, as an OpenTelemetry collector gets them from all processes.
#include "common/base/trace.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <future>
#include <memory>
#include <set>
#include <signal.h>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/otlp_collector.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

using Spans = std::vector<CollectedSpan>;

constexpr double kSpanSeconds = 60;  // long enough on any machine
// Each process takes the wall clock's time once, when it starts, and may be held up as it does.
constexpr double kClockSkew = 0.5;  // s
constexpr int kSlowVocab = 512;

// Long enough to be caught in their midst; shorter under a sanitizer, where steps are long.
int PromptToBeCaught() { return SanitizerSlowsBy() > 1 ? 1600 : 3000; }
int AnswerToBeCaught() { return SanitizerSlowsBy() > 1 ? 80 : 200; }

// What a client says to tracers behind it, in two headers.
constexpr std::array<const char*, 2> kStates = {"vendor=a:1", "other@x=2"};
constexpr char kState[] = "vendor=a:1,other@x=2";

class TraceTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_NE(collector_, nullptr);
    const std::string endpoint = "--otlp-endpoint=" + collector_->address();
    ClusterSpec spec;
    spec.model_dir = SourcePath("tests/data/models/slow");
    spec.prefill = 2;
    spec.decode = 2;
    spec.router_flags = {endpoint, "--trace-sample-ratio=0"};
    // Many small steps, so that a prompt is caught in its middle.
    spec.worker_flags = {"--load-format=dummy",
                         "--dtype=float32",
                         "--num-threads=1",
                         "--kv-cache-memory-bytes=256MiB",
                         endpoint,
                         "--max-num-batched-tokens=128"};
    spec.decode_flags = {"--local-prefill-max-tokens=0"};
    cluster_ = TestCluster::Start(spec);
    ASSERT_NE(cluster_, nullptr);
    client_ = std::make_unique<TestClient>(cluster_->channel());
  }

  // Asks as a client that traces; `caller_` is its span from here on.
  Answer Ask(const v1::GenerateRequest& request, bool sampled = true,
             const std::function<void(const Answer&)>& on_message = {}) {
    caller_ = SampleTrace(1);
    caller_.span = 0x1234;
    caller_.sampled = sampled;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(240));
    context.AddMetadata(kTraceparentKey, Traceparent(caller_));
    for (const char* state : kStates) context.AddMetadata(kTracestateKey, state);
    return client_->Generate(request, &context, on_message);
  }
  // The spans of the last request, once `names` are among them as often as here.
  Spans Collect(const std::vector<std::string>& names) {
    const auto all = [&](const Spans& spans) {
      return std::all_of(names.begin(), names.end(), [&](const std::string& name) {
        return Named(spans, name).size() >=
               static_cast<size_t>(std::count(names.begin(), names.end(), name));
      });
    };
    const std::string trace = caller_.trace.ToHex();
    EXPECT_TRUE(collector_->WaitFor(trace, all, kSpanSeconds)) << cluster_->Logs();
    return collector_->spans(trace);
  }

  static Spans Named(const Spans& spans, const std::string& name) {
    Spans out;
    std::copy_if(spans.begin(), spans.end(), std::back_inserter(out),
                 [&](const CollectedSpan& span) { return span.name == name; });
    return out;
  }
  static Spans ChildrenOf(const Spans& spans, const std::string& id) {
    Spans out;
    std::copy_if(spans.begin(), spans.end(), std::back_inserter(out),
                 [&](const CollectedSpan& span) { return span.parent == id; });
    return out;
  }
  // The one span of that name below `parent`.
  static CollectedSpan Child(const Spans& spans, const CollectedSpan& parent,
                             const std::string& name) {
    const Spans found = Named(ChildrenOf(spans, parent.id), name);
    EXPECT_EQ(found.size(), 1u) << name << " below " << parent.name;
    return found.empty() ? CollectedSpan() : found.front();
  }

  // The router's span, below the caller's. Every other one lies below and within another of the
  // trace.
  CollectedSpan CheckTree(const Spans& spans) const {
    CollectedSpan root;
    std::map<std::string, const CollectedSpan*> by_id;
    for (const CollectedSpan& span : spans) {
      EXPECT_TRUE(by_id.emplace(span.id, &span).second) << "twice: " << span.id;
    }
    for (const CollectedSpan& span : spans) {
      EXPECT_GE(span.end, span.start) << span.name;
      EXPECT_EQ(span.state, kState) << span.name << " of " << span.service;
      if (span.name == "router.request") {
        EXPECT_EQ(span.parent, fmt::format("{:016x}", caller_.span));
        root = span;
        continue;
      }
      const auto parent = by_id.find(span.parent);
      if (parent == by_id.end()) {
        ADD_FAILURE() << span.name << " hangs below nothing";
        continue;
      }
      EXPECT_GE(span.start, parent->second->start - kClockSkew) << span.name;
      EXPECT_LE(span.end, parent->second->end + kClockSkew) << span.name;
    }
    EXPECT_EQ(root.service, "tandem_router");
    return root;
  }
  // What is below a call to a prefill worker that computed the prompt.
  static CollectedSpan CheckPrefill(const Spans& spans, const CollectedSpan& call) {
    const CollectedSpan prefill = Child(spans, call, "prefill.request");
    EXPECT_EQ(prefill.service, "tandem_prefill_worker");
    EXPECT_EQ(prefill.instance, call.attributes.at("prefill_worker"));
    EXPECT_LE(Child(spans, prefill, "prefill_queue").end,
              Child(spans, prefill, "prefill").start + 1e-6);
    return prefill;
  }
  static void CheckTransfer(const Spans& spans, const CollectedSpan& decode,
                            const CollectedSpan& prefill) {
    const CollectedSpan transfer = Child(spans, decode, "kv_transfer");
    EXPECT_EQ(transfer.attributes.at("source"), prefill.instance);
    EXPECT_EQ(transfer.attributes.at("destination"), decode.instance);
    EXPECT_EQ(transfer.attributes.at("transport"), decode.attributes.at("transport"));
    EXPECT_EQ(transfer.attributes.at("kv_bytes"), decode.attributes.at("kv_bytes"));
    EXPECT_GT(std::stoll(transfer.attributes.at("kv_bytes")), 0);
  }
  // The decode worker's span below a call to it.
  static CollectedSpan Decode(const Spans& spans, const CollectedSpan& call) {
    const CollectedSpan decode = Child(spans, call, "decode.request");
    EXPECT_EQ(decode.service, "tandem_decode_worker");
    EXPECT_EQ(decode.instance, call.attributes.at("decode_worker"));
    Child(spans, decode, "queue");
    return decode;
  }

  const std::unique_ptr<OtlpCollector> collector_ = OtlpCollector::Start();
  std::unique_ptr<TestCluster> cluster_;
  std::unique_ptr<TestClient> client_;
  TraceContext caller_;
};

const std::vector<std::string> kOfEachProcess = {"router.request", "decode.request",
                                                 "prefill.request"};

TEST_F(TraceTest, APlainAndACachedRequest) {
  const auto request = TokenRequest(RandomTokens(200, kSlowVocab, 1), 6);
  for (const bool cached : {false, true}) {
    SCOPED_TRACE(cached ? "cached" : "plain");
    const Answer answer = Ask(request);
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster_->Logs();
    const Spans spans = Collect(kOfEachProcess);
    SCOPED_TRACE(ToText(spans));
    const CollectedSpan router = CheckTree(spans);
    EXPECT_EQ(router.kind, opentelemetry::proto::trace::v1::Span::SPAN_KIND_SERVER);
    EXPECT_EQ(router.attributes.at("generated_tokens"), "6");
    EXPECT_EQ(router.attributes.at("code"), "OK");
    EXPECT_GT(std::stod(router.attributes.at("ttft_ms")), 0);
    Child(spans, router, "tokenize");
    Child(spans, router, "queue");
    const CollectedSpan decode = Decode(spans, Child(spans, router, "decode_call"));
    Child(spans, decode, "first_decode_step");
    const CollectedSpan prefill = CheckPrefill(spans, Child(spans, decode, "prefill_call"));
    CheckTransfer(spans, decode, prefill);
    const int cached_tokens = std::stoi(prefill.attributes.at("cached_tokens"));
    EXPECT_EQ(cached_tokens > 0, cached);
    EXPECT_EQ(prefill.attributes.at("computed_tokens"), std::to_string(200 - cached_tokens));
    EXPECT_EQ(cached_tokens, static_cast<int>(answer.usage.cached_tokens()));
    for (const CollectedSpan& span : spans) EXPECT_FALSE(span.error) << span.name;
  }
  // So that a line of the log and a trace are found by each other.
  EXPECT_THAT(ReadWholeFile(cluster_->router().stderr_path),
              testing::HasSubstr("trace_id=" + caller_.trace.ToHex()));
  // And a figure leads to it.
  const std::string page =
      TestCluster::Scrape(cluster_->router(), "application/openmetrics-text; version=1.0.0");
  for (const char* name :
       {"tandem_ttft_seconds", "tandem_inter_token_latency_seconds",
        "tandem_time_per_output_token_seconds", "tandem_request_duration_seconds"}) {
    EXPECT_THAT(page, testing::ContainsRegex(std::string(name) + "_bucket[^#\n]*# .trace_id=\"" +
                                             caller_.trace.ToHex() + "\"."));
  }
}

TEST_F(TraceTest, ARetriedAndAMigratedRequest) {
  // The worker that has the prompt is lost before it is computed.
  auto pending = std::async(std::launch::async, [&] {
    return Ask(TokenRequest(RandomTokens(PromptToBeCaught(), kSlowVocab, 2), 4));
  });
  std::string lost;
  EXPECT_TRUE(cluster_->WaitFor(
      [&](const auto& state) {
        for (const auto& worker : state.workers()) {
          // Some chunks are done, most are not.
          if (worker.role() == "prefill" && worker.waiting_tokens() > 0 &&
              worker.waiting_tokens() + 200 < static_cast<uint64_t>(PromptToBeCaught())) {
            lost = worker.worker_id();
          }
        }
        return !lost.empty();
      },
      30));
  if (!lost.empty()) cluster_->worker(lost).process->Signal(SIGKILL);
  Answer answer = pending.get();
  ASSERT_FALSE(lost.empty());
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster_->Logs();
  {
    const Spans spans = Collect(kOfEachProcess);
    SCOPED_TRACE(ToText(spans));
    const CollectedSpan router = CheckTree(spans);
    const CollectedSpan decode = Decode(spans, Child(spans, router, "decode_call"));
    EXPECT_EQ(decode.attributes.at("prefill_attempts"), "2");
    const Spans calls = Named(ChildrenOf(spans, decode.id), "prefill_call");
    ASSERT_EQ(calls.size(), 2u);
    EXPECT_EQ(calls[0].attributes.at("prefill_worker"), lost);
    EXPECT_TRUE(calls[0].error);
    EXPECT_TRUE(ChildrenOf(spans, calls[0].id).empty()) << "spans of a process that was killed";
    EXPECT_FALSE(calls[1].error);
    EXPECT_GE(calls[1].start, calls[0].end - 1e-6);
    CheckTransfer(spans, decode, CheckPrefill(spans, calls[1]));
  }

  // The worker that streams the answer is lost in its midst. Reports of before would name another.
  ASSERT_TRUE(cluster_->WaitForStreams(0, 60)) << cluster_->GetCluster().DebugString();
  lost.clear();
  answer = Ask(TokenRequest(RandomTokens(40, kSlowVocab, 3), AnswerToBeCaught()), true,
               [&](const Answer& so_far) {
                 if (so_far.token_ids.size() < 5 || !lost.empty()) return;
                 EXPECT_TRUE(cluster_->WaitFor(
                     [&](const auto& state) {
                       for (const auto& worker : state.workers()) {
                         if (worker.role() == "decode" && worker.running() > 0) {
                           lost = worker.worker_id();
                         }
                       }
                       return !lost.empty();
                     },
                     30));
                 if (!lost.empty()) cluster_->worker(lost).process->Signal(SIGKILL);
               });
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster_->Logs();
  ASSERT_EQ(answer.timing.migrations(), 1u);
  const Spans spans =
      Collect({"router.request", "decode.request", "prefill.request", "prefill.request"});
  SCOPED_TRACE(ToText(spans));
  // The first decode worker's own span died with it, and what was below hangs in the air.
  Spans known = spans;
  const auto drop = [&known](const auto& what) { return std::erase_if(known, what); };
  const Spans prefills = Named(spans, "prefill.request");
  ASSERT_EQ(prefills.size(), 2u);
  const std::string orphan = prefills[0].id;
  EXPECT_EQ(drop([&](const CollectedSpan& span) { return span.id == orphan; }), 1u);
  EXPECT_EQ(drop([&](const CollectedSpan& span) { return span.parent == orphan; }), 2u);
  const CollectedSpan router = CheckTree(known);
  EXPECT_EQ(router.attributes.at("migrations"), "1");
  const Spans calls = Named(ChildrenOf(spans, router.id), "decode_call");
  ASSERT_EQ(calls.size(), 2u);
  EXPECT_EQ(calls[0].attributes.at("decode_worker"), lost);
  EXPECT_TRUE(calls[0].error);
  EXPECT_FALSE(calls[1].error);
  EXPECT_EQ(std::stoi(calls[0].attributes.at("generated_tokens")) +
                std::stoi(calls[1].attributes.at("generated_tokens")),
            AnswerToBeCaught());
  const CollectedSpan migration = Child(spans, router, "migration");
  EXPECT_LE(migration.start, calls[0].end + 1e-6);
  EXPECT_GE(migration.end, calls[1].start - 1e-6);
  const CollectedSpan decode = Decode(spans, calls[1]);
  EXPECT_EQ(decode.attributes.at("resumed_tokens"), calls[0].attributes.at("generated_tokens"));
  CheckTransfer(spans, decode, CheckPrefill(spans, Child(spans, decode, "prefill_call")));
}

TEST_F(TraceTest, WhatTheClientDoesNotSampleIsNot) {
  const auto request = TokenRequest(RandomTokens(100, kSlowVocab, 4), 2);
  ASSERT_TRUE(Ask(request, /*sampled=*/false).status.ok());
  const std::string unsampled = caller_.trace.ToHex();
  // Nor one without a trace, at a ratio of 0.
  ASSERT_TRUE(client_->Generate(request).status.ok());
  ASSERT_TRUE(Ask(request).status.ok());
  Collect(kOfEachProcess);
  for (const CollectedSpan& span : collector_->spans()) {
    EXPECT_EQ(span.trace, caller_.trace.ToHex()) << span.name;
  }
  EXPECT_THAT(ReadWholeFile(cluster_->router().stderr_path),
              testing::HasSubstr("trace_id=" + unsampled));
}

}  // namespace
}  // namespace tandem
