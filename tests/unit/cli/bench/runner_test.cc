// Who is sent when, against a client that answers as the test says.
#include "cli/bench/runner.h"

#include <algorithm>
#include <thread>

#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/bench/progress.h"

namespace tandem::cli {
namespace {

using testing::ElementsAre;

// Answers each request from a thread of its own after `delay(request)`, with as many tokens as were
// asked for, all 7, except that prompts of `refused` tokens are refused.
class FakeClient : public BenchClient {
 public:
  using Delay = std::function<absl::Duration(const BenchRequest&)>;
  explicit FakeClient(Delay delay) : delay_(std::move(delay)) {}
  ~FakeClient() override {
    for (std::thread& thread : threads_) thread.join();
  }

  absl::StatusOr<BenchModel> Describe() override { return BenchModel{}; }
  void Start(const BenchRequest& request, std::shared_ptr<AnswerSink> sink) override {
    absl::MutexLock lock(&mutex_);
    prompts_.push_back(request.prompt);
    most_ = std::max(most_, ++running_);
    threads_.emplace_back([this, request, sink = std::move(sink)] {
      const absl::Time end = absl::Now() + delay_(request);
      absl::Status status;
      {
        absl::MutexLock wait(&mutex_);
        if (mutex_.AwaitWithDeadline(absl::Condition(&cancelled_), end)) {
          status = absl::CancelledError("");
        }
        --running_;
      }
      if (status.ok() && request.prompt.size() == refused) status = absl::UnavailableError("no");
      if (status.ok()) {
        sink->OnTokens(std::vector<uint32_t>(static_cast<size_t>(request.output_tokens), 7));
      }
      sink->OnEnd(status, {});
    });
  }
  void CancelAll() override {
    absl::MutexLock lock(&mutex_);
    cancelled_ = true;
  }

  std::vector<std::vector<uint32_t>> prompts() {
    absl::MutexLock lock(&mutex_);
    return prompts_;
  }
  int most() {
    absl::MutexLock lock(&mutex_);
    return most_;
  }

  size_t refused = 0;

 private:
  const Delay delay_;
  absl::Mutex mutex_;
  bool cancelled_ = false;
  int running_ = 0;
  int most_ = 0;
  std::vector<std::vector<uint32_t>> prompts_;
  std::vector<std::thread> threads_;
};

std::vector<Conversation> Singles(const std::vector<double>& at_s) {
  std::vector<Conversation> out;
  for (const double at : at_s) out.push_back({at, {{{{out.size(), 5}}, 3}}});
  return out;
}

FakeClient::Delay Always(absl::Duration delay) {
  return [delay](const BenchRequest&) { return delay; };
}

RunnerOptions Options(int max_concurrency) {
  RunnerOptions options;
  options.max_concurrency = max_concurrency;
  options.vocab_size = 100;
  return options;
}

double Seconds(absl::Duration duration) { return absl::ToDoubleSeconds(duration); }

TEST(BenchRunner, ClosedLoopKeepsItsConcurrency) {
  FakeClient client(Always(absl::Milliseconds(20)));
  BenchRunner runner(Options(3), &client, Clock::Real());
  const auto workload = Singles(std::vector<double>(12));
  const RunOutcome outcome = runner.Run(workload);
  EXPECT_EQ(outcome.records.size(), 12u);
  EXPECT_EQ(client.most(), 3);
  EXPECT_GE(Seconds(outcome.duration), 0.08);
  for (const RequestRecord& record : outcome.records) {
    EXPECT_EQ(record.output_tokens(), 3);
    EXPECT_EQ(record.prompt_tokens, 5);
    // From the moment that the place was free.
    EXPECT_GE(record.sent, record.intended);
    EXPECT_LT(record.sent - record.intended, absl::Milliseconds(500));
  }
}

// What coordinated omission would hide: the server takes one at a time, and each of the following
// waits for those before it. That counts.
TEST(BenchRunner, AnOpenLoopCountsFromTheSchedule) {
  FakeClient client(Always(absl::Milliseconds(100)));
  RunnerOptions options = Options(1);
  options.open_loop = true;
  BenchRunner runner(options, &client, Clock::Real());
  const auto workload = Singles({0, 0.01, 0.02, 0.03});
  const RunOutcome outcome = runner.Run(workload);
  ASSERT_EQ(outcome.records.size(), 4u);
  EXPECT_EQ(outcome.records[3].intended - outcome.records[0].intended, absl::Milliseconds(30));
  EXPECT_GE(Seconds(outcome.records[3].ended - outcome.records[3].intended), 0.37);
}

TEST(BenchRunner, AnOpenLoopDoesNotWaitForAnswers) {
  FakeClient client(Always(absl::Milliseconds(300)));
  RunnerOptions options = Options(0);
  options.open_loop = true;
  BenchRunner runner(options, &client, Clock::Real());
  const auto workload = Singles({0, 0.02, 0.04, 0.06, 0.08});
  const RunOutcome outcome = runner.Run(workload);
  EXPECT_EQ(client.most(), 5);
  for (const RequestRecord& record : outcome.records) EXPECT_GE(record.sent, record.intended);
}

TEST(BenchRunner, AStaticBatchWaitsForItsLast) {
  // In each batch of two, one answer is ten times as slow.
  FakeClient client([](const BenchRequest& request) {
    return absl::Milliseconds(request.output_tokens == 1 ? 10 : 100);
  });
  RunnerOptions options = Options(2);
  options.static_batches = true;
  BenchRunner runner(options, &client, Clock::Real());
  std::vector<Conversation> workload = Singles(std::vector<double>(6));
  for (size_t i = 0; i < workload.size(); i += 2) workload[i].turns[0].output_tokens = 1;
  const RunOutcome outcome = runner.Run(workload);
  ASSERT_EQ(outcome.records.size(), 6u);
  EXPECT_EQ(client.most(), 2);
  EXPECT_GE(Seconds(outcome.duration), 0.3);
  for (size_t i = 2; i < 6; ++i) {
    EXPECT_GE(outcome.records[i].sent, outcome.records[i / 2 * 2 - 1].ended);
  }
}

TEST(BenchRunner, ASecondTurnRepeatsWhatWasSaid) {
  FakeClient client(Always(absl::ZeroDuration()));
  BenchRunner runner(Options(1), &client, Clock::Real());
  const auto workload = TwoTurnWorkload(1, 6, 2, {.output = 3});
  const RunOutcome outcome = runner.Run(workload);
  ASSERT_EQ(outcome.records.size(), 2u);
  EXPECT_EQ(outcome.records[1].turn, 1u);
  EXPECT_EQ(outcome.records[1].intended, outcome.records[0].ended);
  const auto prompts = client.prompts();
  ASSERT_EQ(prompts.size(), 2u);
  ASSERT_EQ(prompts[0].size(), 6u);
  ASSERT_EQ(prompts[1].size(), 11u);
  EXPECT_TRUE(std::equal(prompts[0].begin(), prompts[0].end(), prompts[1].begin()));
  EXPECT_THAT(std::vector<uint32_t>(prompts[1].begin() + 6, prompts[1].begin() + 9),
              ElementsAre(7, 7, 7));
}

TEST(BenchRunner, AFailureEndsItsConversationAlone) {
  FakeClient client(Always(absl::ZeroDuration()));
  client.refused = 6;
  BenchRunner runner(Options(1), &client, Clock::Real());
  auto workload = TwoTurnWorkload(2, 6, 2, {.output = 3});
  workload[1].turns[0].pieces[0].tokens = 4;
  RunProgress last;
  const RunOutcome outcome = runner.Run(workload, [&](const RunProgress& p) { last = p; });
  ASSERT_EQ(outcome.records.size(), 3u);
  EXPECT_EQ(outcome.records[0].status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(outcome.records[2].turn, 1u);
  EXPECT_FALSE(outcome.stopped);
}

TEST(BenchRunner, StopCancelsAndKeepsWhatHasEnded) {
  FakeClient client([](const BenchRequest& request) {
    return request.output_tokens == 1 ? absl::ZeroDuration() : absl::Seconds(60);
  });
  BenchRunner runner(Options(2), &client, Clock::Real());
  std::vector<Conversation> workload = Singles(std::vector<double>(10));
  workload[0].turns[0].output_tokens = 1;
  std::thread stopper([&] {
    while (client.prompts().size() < 3) absl::SleepFor(absl::Milliseconds(1));
    runner.Stop();
  });
  const RunOutcome outcome = runner.Run(workload);
  stopper.join();
  EXPECT_TRUE(outcome.stopped);
  EXPECT_EQ(outcome.records.size(), 1u);
  EXPECT_LT(Seconds(outcome.duration), 30);
}

TEST(BenchProgress, IsOneLine) {
  EXPECT_EQ(DescribeProgress({absl::Seconds(30), 25, 1, 3, 15360}, 100),
            "[=====>              ] 25/100, 3 running, 1 failed, 512.0 tok/s, 1m30s left");
  EXPECT_EQ(DescribeProgress({}, 2), "[>                   ] 0/2, 0 running, 0 failed, 0.0 tok/s");
}

}  // namespace
}  // namespace tandem::cli
