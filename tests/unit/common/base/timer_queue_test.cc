#include "common/base/timer_queue.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "simulation/fake_clock.h"

namespace tandem {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class TimerQueueTest : public ::testing::Test {
 protected:
  TimerQueue::Id Set(absl::Duration in, int value) {
    return timers_.Set(clock_.Now() + in, [this, value] { fired_.push_back(value); });
  }

  FakeClock clock_;
  int earlier_ = 0;
  TimerQueue timers_{&clock_, [this] { ++earlier_; }};
  std::vector<int> fired_;
};

TEST_F(TimerQueueTest, FiresWhatIsDueInTheOrderOfTime) {
  Set(absl::Seconds(2), 2);
  Set(absl::Seconds(1), 1);
  Set(absl::Seconds(3), 3);
  EXPECT_EQ(timers_.FireDue(), 0u);
  clock_.Advance(absl::Seconds(2));
  EXPECT_EQ(timers_.FireDue(), 2u);
  EXPECT_THAT(fired_, ElementsAre(1, 2));
  EXPECT_EQ(timers_.Next(), clock_.Now() + absl::Seconds(1));
}

TEST_F(TimerQueueTest, ACancelledTimerDoesNotFire) {
  const TimerQueue::Id id = Set(absl::Seconds(1), 1);
  timers_.Cancel(id);
  timers_.Cancel(id);
  timers_.Cancel(0);
  clock_.Advance(absl::Seconds(1));
  EXPECT_EQ(timers_.FireDue(), 0u);
  EXPECT_THAT(fired_, IsEmpty());
  EXPECT_EQ(timers_.Next(), absl::InfiniteFuture());
}

TEST_F(TimerQueueTest, SaysWhenTheNextTimeMovesForward) {
  Set(absl::Seconds(2), 2);
  EXPECT_EQ(earlier_, 1);
  Set(absl::Seconds(3), 3);
  EXPECT_EQ(earlier_, 1);
  Set(absl::Seconds(1), 1);
  EXPECT_EQ(earlier_, 2);
}

TEST_F(TimerQueueTest, ATimerMaySetAndCancelOthers) {
  const TimerQueue::Id later = Set(absl::Seconds(2), 2);
  timers_.Set(clock_.Now() + absl::Seconds(1), [&] {
    timers_.Cancel(later);
    Set(absl::ZeroDuration(), 7);
  });
  clock_.Advance(absl::Seconds(5));
  EXPECT_EQ(timers_.FireDue(), 2u);
  EXPECT_THAT(fired_, ElementsAre(7));
}

}  // namespace
}  // namespace tandem
