#include "worker/watchdog.h"

#include <vector>

#include "gtest/gtest.h"

#include "simulation/fake_clock.h"

namespace tandem::worker {
namespace {

class WatchdogTest : public testing::Test {
 protected:
  Watchdog::Options Options() {
    Watchdog::Options options;
    options.limit = absl::Seconds(60);
    options.within_turn = &layers_;
    options.on_stuck = [this](absl::Duration) { ++stuck_; };
    return options;
  }
  // Half a second goes by, `times` times.
  void Pass(int times) {
    for (int i = 0; i < times; ++i) {
      clock_.Advance(absl::Milliseconds(500));
      if (const auto age = watchdog_.Look()) reported_.push_back(*age);
    }
  }

  FakeClock clock_;
  std::atomic<uint64_t> layers_ = 0;
  std::vector<absl::Duration> reported_;
  int stuck_ = 0;
  Watchdog watchdog_{Options(), &clock_};
};

TEST_F(WatchdogTest, ALoopThatTurnsIsLeftAlone) {
  for (int i = 0; i < 1000; ++i) {
    watchdog_.NoteTurn();
    Pass(1);
  }
  EXPECT_TRUE(reported_.empty());
  EXPECT_EQ(stuck_, 0);
}

TEST_F(WatchdogTest, AStepThatHangsIsToldAndThenEnded) {
  watchdog_.NoteTurn();
  Pass(1);
  Pass(6);
  ASSERT_EQ(reported_.size(), 6u);
  EXPECT_EQ(reported_.back(), absl::Seconds(3));
  Pass(113);
  EXPECT_EQ(stuck_, 0);
  Pass(1);
  EXPECT_EQ(stuck_, 1);
}

// A prompt of minutes on a CPU: one turn, many layers.
TEST_F(WatchdogTest, ALongStepThatGetsOnIsToldOfAndNotEnded) {
  for (int i = 0; i < 1000; ++i) {
    if (i % 4 == 0) ++layers_;
    Pass(1);
  }
  EXPECT_GT(reported_.size(), 900u);
  for (const absl::Duration age : reported_) EXPECT_LE(age, absl::Milliseconds(1500));
  EXPECT_EQ(stuck_, 0);
}

TEST_F(WatchdogTest, AProcessThatWasStoppedIsNotStuck) {
  Pass(2);
  clock_.Advance(absl::Hours(1));
  watchdog_.Look();
  EXPECT_EQ(stuck_, 0);
}

TEST_F(WatchdogTest, LooksOnAThreadOfItsOwn) {
  Watchdog::Options options = Options();
  options.period = absl::Milliseconds(1);
  options.limit = absl::Milliseconds(20);
  absl::Notification told, stuck;
  options.report = [&](absl::Duration) {
    if (!told.HasBeenNotified()) told.Notify();
  };
  options.on_stuck = [&](absl::Duration) {
    if (!stuck.HasBeenNotified()) stuck.Notify();
  };
  Watchdog watchdog(options, Clock::Real());
  watchdog.Start();
  told.WaitForNotification();
  stuck.WaitForNotification();
}

// The loop hangs while it holds the lock of what the cluster is told through.
TEST_F(WatchdogTest, EndsAProcessThatCannotTell) {
  Watchdog::Options options = Options();
  options.period = absl::Milliseconds(1);
  options.limit = absl::Milliseconds(20);
  absl::Notification stuck;
  options.report = [&](absl::Duration) { stuck.WaitForNotification(); };
  options.on_stuck = [&](absl::Duration) {
    if (!stuck.HasBeenNotified()) stuck.Notify();
  };
  Watchdog watchdog(options, Clock::Real());
  watchdog.Start();
  EXPECT_TRUE(stuck.WaitForNotificationWithTimeout(absl::Seconds(20)));
  if (!stuck.HasBeenNotified()) stuck.Notify();
}

}  // namespace
}  // namespace tandem::worker
