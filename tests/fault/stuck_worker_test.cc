// A worker that lives and gets nowhere: its process is stopped, or the thread that computes hangs
// while all others answer. It costs a request at most one failed try and the time after which the
// router calls it stalled; and a hung process is ended by its own watchdog.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <optional>
#include <semaphore>
#include <signal.h>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/frozen_thread.h"
#include "tests/support/paths.h"
#include "tests/support/process_usage.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

constexpr double kStalledAfterMs = 3000;
// For what a request takes by itself on a busy machine; far below what a stream with tokens waits.
constexpr double kSlackMs = 2000;

ClusterSpec StuckSpec() {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.prefill = spec.decode = 2;
  spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  return spec;
}

enum class How { kStopped, kHangs };

struct Case {
  How how;
  std::string worker;
};

void PrintTo(const Case& c, std::ostream* out) {
  *out << c.worker << (c.how == How::kStopped ? " stopped" : " hangs");
}

class Stuck {
 public:
  Stuck(const Member& worker, How how) : worker_(worker) {
    if (how == How::kStopped) {
      worker_.process->Signal(SIGSTOP);
    } else {
      const auto loop = ThreadNamed(worker_.process->pid(), "tandem-loop");
      if (loop.has_value()) frozen_.emplace(*loop);
      EXPECT_TRUE(frozen_.has_value() && frozen_->frozen());
    }
  }

 private:
  const Member& worker_;
  std::optional<FrozenThread> frozen_;
};

class StuckWorker : public testing::TestWithParam<Case> {};

TEST_P(StuckWorker, CostsARequestOneFailedTryAndThreeSeconds) {
  auto cluster = TestCluster::Start(StuckSpec());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  constexpr int kRequests = 70;
  // At once: what waits for room on a machine that is too slow for the rest says nothing here.
  std::counting_semaphore<> room(16);
  std::vector<Answer> answers(kRequests);
  std::vector<std::thread> threads;
  std::optional<Stuck> stuck;
  for (int i = 0; i < kRequests; ++i) {
    if (i == 10) stuck.emplace(cluster->worker(GetParam().worker), GetParam().how);
    room.acquire();
    threads.emplace_back([&, i] {
      answers[i] = client.Generate(TokenRequest(RandomTokens(150, kDemoVocab, 100 + i), 8), 60);
      room.release();
    });
    SleepMilliseconds(100);
  }
  for (std::thread& thread : threads) thread.join();
  int cost = 0;
  double longest_failed_ms = 0, longest_wait_ms = 0, longest_gap_ms = 0;
  for (int i = 0; i < kRequests; ++i) {
    const v1::Timing& timing = answers[i].timing;
    EXPECT_TRUE(answers[i].status.ok()) << i << ": " << answers[i].status.error_message();
    EXPECT_LE(timing.prefill_attempts(), 2u) << i;
    cost += timing.failed_attempts() > 0 || timing.migrations() > 0;
    longest_failed_ms = std::max(longest_failed_ms, timing.failed_attempts());
    longest_gap_ms = std::max(longest_gap_ms, answers[i].longest_gap_ms);
    // The worker that is left computes what two did; on a slow machine prompts queue there.
    longest_wait_ms =
        std::max(longest_wait_ms, timing.ttft() - timing.prefill_queue() - timing.prefill());
  }
  std::printf(
      "%s: %d of %d requests lost time, up to %.0f ms in failed tries; at most %.0f ms before the "
      "first token without being computed, longest gap %.0f ms\n",
      testing::PrintToString(GetParam()).c_str(), cost, kRequests, longest_failed_ms,
      longest_wait_ms, longest_gap_ms);
  const double limit_ms = kStalledAfterMs + kSlackMs * SanitizerSlowsBy();
  EXPECT_LE(longest_failed_ms, limit_ms);
  EXPECT_LE(longest_wait_ms, limit_ms);
}

INSTANTIATE_TEST_SUITE_P(Cases, StuckWorker,
                         testing::Values(Case{How::kStopped, "prefill-0"},
                                         Case{How::kStopped, "decode-0"},
                                         Case{How::kHangs, "prefill-0"},
                                         Case{How::kHangs, "decode-0"}));

// Streams that have tokens of a worker which hangs are taken up by another one, whoever notices.
class HangUnderStreams : public testing::Test {
 protected:
  static constexpr int kStreams = 8;

  std::vector<Answer> Ask(const std::function<void()>& meanwhile) {
    TestClient client(cluster_->channel());
    std::vector<Answer> answers(kStreams);
    std::vector<std::thread> threads;
    for (int i = 0; i < kStreams; ++i) {
      threads.emplace_back([&, i] {
        const int tokens = SanitizerSlowsBy() > 1 ? 200 : 400;
        answers[i] =
            client.Generate(TokenRequest(RandomTokens(50, kDemoVocab, 300 + i), tokens), 120);
      });
    }
    meanwhile();
    for (std::thread& thread : threads) thread.join();
    return answers;
  }

  // Hangs decode-0 while all streams run, and calls `meanwhile`.
  void HangAndCompare(ClusterSpec spec, const std::function<void()>& meanwhile) {
    spec.worker_flags.push_back("--min-step-ms=10");  // streams last longer than reports take
    cluster_ = TestCluster::Start(spec);
    ASSERT_NE(cluster_, nullptr);
    const std::vector<Answer> undisturbed = Ask([] {});
    ASSERT_TRUE(cluster_->WaitForStreams(0, 30)) << cluster_->GetCluster().DebugString();
    std::optional<Stuck> stuck;
    const std::vector<Answer> answers = Ask([&] {
      EXPECT_TRUE(cluster_->WaitForStreams(kStreams, 60)) << cluster_->GetCluster().DebugString();
      stuck.emplace(cluster_->worker("decode-0"), How::kHangs);
      meanwhile();
    });
    uint32_t moved = 0;
    double longest_gap_ms = 0;
    for (int i = 0; i < kStreams; ++i) {
      EXPECT_TRUE(answers[i].status.ok()) << answers[i].status.error_message();
      EXPECT_EQ(answers[i].token_ids, undisturbed[i].token_ids) << i;
      EXPECT_EQ(answers[i].logprobs, undisturbed[i].logprobs) << i;
      moved += answers[i].timing.migrations();
      longest_gap_ms = std::max(longest_gap_ms, answers[i].longest_gap_ms);
    }
    std::printf("%u of %d streams went on elsewhere; the longest gap was %.0f ms\n", moved,
                kStreams, longest_gap_ms);
    EXPECT_GE(moved, 1u);
  }

  std::unique_ptr<TestCluster> cluster_;
};

TEST_F(HangUnderStreams, TheStepTimeoutEndsTheProcess) {
  ClusterSpec spec = StuckSpec();
  spec.worker_flags.push_back("--step-timeout=4");
  HangAndCompare(spec, [this] {
    Member& worker = cluster_->worker("decode-0");
    EXPECT_EQ(worker.process->Wait(30), 128 + SIGABRT);
    EXPECT_THAT(ReadWholeFile(worker.stderr_path),
                testing::HasSubstr("a step hangs (--step-timeout); ending the process"));
  });
}

TEST_F(HangUnderStreams, TheRouterTakesTheStreamsAway) {
  ClusterSpec spec = StuckSpec();
  spec.router_flags.push_back("--worker-lost-after=4");
  HangAndCompare(spec, [] {});
}

}  // namespace
}  // namespace tandem
