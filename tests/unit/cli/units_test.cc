#include "cli/units.h"

#include "gtest/gtest.h"

namespace tandem::cli {
namespace {

TEST(Units, Counts) {
  EXPECT_EQ(CountText(0), "0");
  EXPECT_EQ(CountText(999), "999");
  EXPECT_EQ(CountText(13'891), "13,891");
  EXPECT_EQ(CountText(1'234'567), "1,234,567");
}

TEST(Units, Times) {
  EXPECT_EQ(TimeText(absl::Milliseconds(-3)), "0.0s");
  EXPECT_EQ(TimeText(absl::Milliseconds(3'240)), "3.2s");
  EXPECT_EQ(TimeText(absl::Milliseconds(9'960)), "10s");
  EXPECT_EQ(TimeText(absl::Seconds(59.6)), "1m00s");
  EXPECT_EQ(TimeText(absl::Seconds(134)), "2m14s");
  EXPECT_EQ(TimeText(absl::Hours(5) + absl::Minutes(3)), "5h03m");
  EXPECT_EQ(TimeText(absl::Hours(12 * 24 + 4)), "12d04h");
  EXPECT_EQ(TimeText(absl::InfiniteDuration()), "41666d16h");
}

TEST(Units, SharesNeverRoundToNothingOrAll) {
  EXPECT_EQ(ShareText(0, 0), "-");
  EXPECT_EQ(ShareText(0, 1000), "0 %");
  EXPECT_EQ(ShareText(1, 1000), "1 %");
  EXPECT_EQ(ShareText(12, 100), "12 %");
  EXPECT_EQ(ShareText(999, 1000), "99 %");
  EXPECT_EQ(ShareText(1000, 1000), "100 %");
}

}  // namespace
}  // namespace tandem::cli
