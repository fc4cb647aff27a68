#include <csignal>
#include <thread>
#include <unistd.h>

#include "gtest/gtest.h"

#include "common/base/log.h"
#include "common/rpc/end_on_signal.h"
#include "common/rpc/server.h"

namespace tandem {
namespace {

TEST(SignalWaiterTest, ReturnsSignalsAndWakes) {
  sigset_t before;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  {
    SignalWaiter waiter;
    raise(SIGTERM);  // blocked, so it stays pending; to this thread: others of the process block
                     // nothing
    EXPECT_EQ(waiter.Wait(), SIGTERM);
    raise(SIGINT);
    EXPECT_EQ(waiter.Wait(), SIGINT);
    std::thread thread([&waiter] { waiter.Wake(); });
    EXPECT_EQ(waiter.Wait(), 0);
    thread.join();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// Without it the signal stays pending until somebody waits, and a worker that loads for a minute
// does not end for a minute.
TEST(EndOnSignalDeathTest, ASignalEndsTheProcessAtOnce) {
  EXPECT_EXIT(
      {
        SignalWaiter signals;
        StartLog("worker", {});
        const EndOnSignal end_on_signal("loading the model");
        kill(getpid(), SIGTERM);
        pause();  // only another signal would end this
      },
      testing::ExitedWithCode(0), "stopped by a signal while loading the model");
}

TEST(EndOnSignalTest, ALaterSignalIsWaitedFor) {
  sigset_t before;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  {
    SignalWaiter signals;
    { const EndOnSignal end_on_signal("loading the model"); }
    raise(SIGTERM);
    EXPECT_EQ(signals.Wait(), SIGTERM);
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace
}  // namespace tandem
