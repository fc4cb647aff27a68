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
    kill(getpid(), SIGTERM);  // blocked: stays pending until it is waited for
    EXPECT_EQ(waiter.Wait(), SIGTERM);
    kill(getpid(), SIGINT);
    EXPECT_EQ(waiter.Wait(), SIGINT);
    std::thread thread([&waiter] { waiter.Wake(); });
    EXPECT_EQ(waiter.Wait(), 0);
    thread.join();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace
}  // namespace tandem
