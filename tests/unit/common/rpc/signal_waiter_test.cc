#include <csignal>
#include <thread>

#include "gtest/gtest.h"

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

}  // namespace
}  // namespace tandem
