#include "prefill_worker/scheduler.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::prefill {
namespace {

using testing::ElementsAre;

TEST(PrefillAdmission, SmallerOnesPassABigOneThatWaits) {
  EXPECT_THAT(NextAdmissions(std::vector<WaitingView>{{10, 0}, {3, 0}, {4, 0}, {1, 0}}, 5),
              ElementsAre(1, 3));
}

TEST(PrefillAdmission, ButNotForever) {
  EXPECT_THAT(NextAdmissions(std::vector<WaitingView>{{2, 0}, {10, kMaxTimesPassed}, {1, 0}}, 5),
              ElementsAre(0));
}

}  // namespace
}  // namespace tandem::prefill
