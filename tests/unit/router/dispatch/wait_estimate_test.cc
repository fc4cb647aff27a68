#include "router/dispatch/wait_estimate.h"

#include <algorithm>

#include "gtest/gtest.h"

namespace tandem::router {
namespace {

constexpr int kPromptTokens = 100;

// A queue that lets one request go every so often, looked at every 10 ms.
class Queue {
 public:
  void Stand(absl::Duration how_long, absl::Duration each, int tokens = kPromptTokens) {
    for (absl::Duration at; at < how_long; at += kTurn) {
      now_ += kTurn;
      const bool one_goes = now_ >= last_left_ + each;
      if (one_goes) last_left_ = now_;
      estimate_.Observe(now_, one_goes ? 1 : 0, one_goes ? tokens : 0, /*waiting=*/true);
    }
  }
  // Nothing waits any more; then nothing happens for a while.
  void RunEmpty() { estimate_.Observe(now_, 0, 0, /*waiting=*/false); }
  void Pass(absl::Duration how_long) { now_ += how_long; }
  // So many come at once, find no room, and wait.
  void Burst() { estimate_.Observe(now_, 0, 0, /*waiting=*/true); }

  double SecondsBehind(int requests, int tokens_each = kPromptTokens) const {
    return absl::ToDoubleSeconds(estimate_.Behind(requests, int64_t{requests} * tokens_each));
  }

 private:
  static constexpr absl::Duration kTurn = absl::Milliseconds(10);
  WaitEstimate estimate_;
  absl::Time now_ = absl::UnixEpoch();
  absl::Time last_left_ = absl::UnixEpoch();
};

TEST(WaitEstimate, SaysHowLongThoseAheadWillTake) {
  Queue queue;
  queue.Stand(absl::Seconds(3), absl::Milliseconds(100));
  EXPECT_NEAR(queue.SecondsBehind(10), 1.0, 0.1);
  // Follows a change in a few seconds.
  queue.Stand(absl::Seconds(15), absl::Milliseconds(20));
  EXPECT_NEAR(queue.SecondsBehind(10), 0.2, 0.04);
}

TEST(WaitEstimate, KnowsNothingAtFirst) {
  Queue queue;
  EXPECT_EQ(queue.SecondsBehind(1000), 0);
  // The first step of a worker may take long.
  queue.Burst();
  queue.Stand(absl::Milliseconds(900), absl::Milliseconds(900));
  EXPECT_EQ(queue.SecondsBehind(1000), 0);
}

TEST(WaitEstimate, AQueueThatHasRunEmptyHoldsBackNobody) {
  Queue queue;
  queue.Stand(absl::Seconds(5), absl::Milliseconds(500));
  EXPECT_GT(queue.SecondsBehind(4), 1);
  queue.RunEmpty();
  EXPECT_EQ(queue.SecondsBehind(4), 0);
}

TEST(WaitEstimate, ForgetsHowFastItMovedWhileNothingWaited) {
  Queue queue;
  queue.Stand(absl::Seconds(5), absl::Milliseconds(500));
  queue.RunEmpty();
  // A moment later it is still the same cluster.
  queue.Pass(absl::Seconds(1));
  queue.Burst();
  EXPECT_NEAR(queue.SecondsBehind(10), 5, 1.5);
  queue.RunEmpty();
  queue.Pass(absl::Minutes(1));
  queue.Burst();
  EXPECT_EQ(queue.SecondsBehind(10), 0);
  queue.Stand(absl::Seconds(1), absl::Milliseconds(20));
  EXPECT_NEAR(queue.SecondsBehind(10), 0.2, 0.05);
}

TEST(WaitEstimate, TinyPromptsSayLittleOfLongOnes) {
  Queue queue;
  queue.Stand(absl::Seconds(5), absl::Milliseconds(100), /*tokens=*/10);
  // By their tokens ten of 4,000 would take 400 s.
  EXPECT_NEAR(queue.SecondsBehind(10, 4000), 1.0, 0.1);
  // And the other way round.
  Queue of_long_ones;
  of_long_ones.Stand(absl::Seconds(5), absl::Milliseconds(500), /*tokens=*/4000);
  EXPECT_NEAR(of_long_ones.SecondsBehind(100, 10), 0.125, 0.02);
}

TEST(WaitEstimate, ASlowQueueIsRememberedForAsLongAsItStands) {
  Queue queue;
  const absl::Duration each = absl::Seconds(8);
  queue.Stand(absl::Seconds(60), each);
  double least = 1e9, most = 0;
  for (int i = 0; i < 80; ++i) {
    queue.Stand(absl::Seconds(0.2), each);
    least = std::min(least, queue.SecondsBehind(1));
    most = std::max(most, queue.SecondsBehind(1));
  }
  EXPECT_GT(least, 6);
  EXPECT_LT(most, 12);
}

}  // namespace
}  // namespace tandem::router
