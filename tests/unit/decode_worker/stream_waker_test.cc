#include "decode_worker/stream_waker.h"

#include <atomic>
#include <memory>
#include <vector>

#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"

namespace tandem::decode {
namespace {

TEST(StreamWakerTest, WakesEachStreamOnceInOrderAwayFromTheCaller) {
  std::vector<int> woken;  // by the waker's thread only
  std::thread::id by;
  {
    StreamWaker waker;
    for (int round = 0; round < 3; ++round) {
      std::vector<std::shared_ptr<TokenStream>> idle;
      for (int i = 0; i < 4; ++i) {
        const int number = 4 * round + i;
        idle.push_back(std::make_shared<TokenStream>(
            [&woken, &by, number] {
              woken.push_back(number);
              by = std::this_thread::get_id();
            },
            nullptr));
      }
      waker.Wake(std::move(idle));
    }
  }  // what was given is woken before it goes
  EXPECT_EQ(woken, (std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}));
  EXPECT_NE(by, std::this_thread::get_id());
}

TEST(StreamWakerTest, ATakerThatBlocksDoesNotBlockTheCaller) {
  absl::Notification go_on;
  std::atomic<int> woken = 0;
  StreamWaker waker;
  const auto make = [&] {
    return std::make_shared<TokenStream>(
        [&] {
          go_on.WaitForNotification();
          ++woken;
        },
        nullptr);
  };
  for (int i = 0; i < 10; ++i) waker.Wake({make()});
  EXPECT_EQ(woken, 0);
  go_on.Notify();
}

}  // namespace
}  // namespace tandem::decode
