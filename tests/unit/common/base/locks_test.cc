#include "common/base/locks.h"

#include <cstdlib>

#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

namespace tandem {
namespace {

TEST(LocksDeathTest, AProgramIsNotEndedForTheOrderOfItsLocks) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // the mode is the process's
  EXPECT_EXIT(
      {
        WatchNoLockOrders();
        absl::Mutex a;
        absl::Mutex b;
        a.Lock();
        b.Lock();
        b.Unlock();
        a.Unlock();
        b.Lock();
        a.Lock();  // a watched process ends here
        a.Unlock();
        b.Unlock();
        std::exit(0);
      },
      testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace tandem
