// Back-pressure: a client that takes nothing stops the reading of the decode worker.
#include "router/stream/request_stream.h"

#include <memory>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "router/policy/cost_policy.h"
#include "tests/support/paths.h"
#include "tests/unit/router/fake_worker.h"

namespace tandem::router {
namespace {

// Keeps every message and lets no write end by itself.
class StalledSink : public StreamSink {
 public:
  void Write(const StreamUpdate& update) override {
    absl::MutexLock lock(&mutex_);
    updates_.push_back(update);
  }
  void Finish(const absl::Status& status) override {
    absl::MutexLock lock(&mutex_);
    status_ = status;
    finished_ = true;
  }
  void Abort() override {}

  StreamUpdate AwaitUpdate(size_t number) {
    absl::MutexLock lock(&mutex_);
    const auto there = [&] { return updates_.size() > number; };
    mutex_.Await(absl::Condition(&there));
    return updates_[number];
  }
  absl::Status AwaitFinish() {
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(&finished_));
    return status_;
  }

 private:
  absl::Mutex mutex_;
  std::vector<StreamUpdate> updates_;
  absl::Status status_;
  bool finished_ = false;
};

TEST(RequestStream, AStalledClientPausesTheWorkerAndLosesNothing) {
  constexpr int kEvents = 100, kPerEvent = 50;  // far more than may be pending
  FakeDecodeService service([](std::shared_ptr<FakeCall> call) {
    for (int i = 0; i < kEvents; ++i) {
      call->Send(std::vector<int32_t>(kPerEvent, i),
                 i + 1 == kEvents ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_UNSPECIFIED);
    }
    call->End(grpc::Status::OK);
  });
  auto server = RpcServer::Start({}, {&service});
  ASSERT_OK(server);

  PrefixIndex index;
  Registry registry({"m", "", 0, ""}, &index, Clock::Real());
  Metrics metrics;
  RouterMetrics router_metrics(&metrics);
  const CostPolicy policy;
  Dispatcher dispatcher({}, &registry, &index, &policy, &router_metrics, Clock::Real());
  DecodeClient client;
  WorkerIdentity identity;
  identity.id = "u";
  identity.role = WorkerRole::kUnified;
  identity.address = (*server)->address();
  identity.max_num_seqs = 4;
  identity.num_blocks = 100;
  ASSERT_OK(registry.Join(identity, FakeCapability("m", 512), nullptr));

  Request request;
  request.id = "r";
  request.tokens = {1, 2, 3};
  request.max_tokens = kEvents * kPerEvent;
  request.received = absl::Now();
  request.deadline = absl::Now() + absl::Seconds(60);
  request.message = std::make_shared<internal::v1::DecodeRequest>();
  auto text = TextEmitter::Create(nullptr, {}, 0);
  ASSERT_OK(text);
  StalledSink sink;
  auto stream = std::make_shared<RequestStream>(
      std::move(request), *std::move(text), &sink,
      StreamContext{&dispatcher, &client, &router_metrics, Clock::Real()});
  stream->Begin();

  std::vector<int32_t> tokens;
  StreamUpdate update;
  for (size_t number = 0; update.finish_reason == FinishReason::kNone; ++number) {
    update = sink.AwaitUpdate(number);
    EXPECT_LT(update.token_ids.size(), RequestStream::kMaxPendingTokens + kPerEvent);
    tokens.insert(tokens.end(), update.token_ids.begin(), update.token_ids.end());
    EXPECT_EQ(update.completion_tokens, std::ssize(tokens));
    if (number == 0) {
      // What the stalled client has not taken piles up to the bound, and no further.
      const double bound = RequestStream::kMaxPendingTokens + 2.0 * kPerEvent;
      const absl::Time limit = absl::Now() + absl::Seconds(20);
      while (router_metrics.generation_tokens.Value() < RequestStream::kMaxPendingTokens) {
        ASSERT_LT(absl::Now(), limit);
        absl::SleepFor(absl::Milliseconds(1));
      }
      EXPECT_LE(router_metrics.generation_tokens.Value(), bound);
    }
    stream->OnWritten(true);
  }
  EXPECT_OK(sink.AwaitFinish());
  ASSERT_EQ(std::ssize(tokens), kEvents * kPerEvent);
  for (size_t i = 0; i < tokens.size(); ++i) {
    ASSERT_EQ(tokens[i], static_cast<int32_t>(i) / kPerEvent) << i;
  }
}

}  // namespace
}  // namespace tandem::router
