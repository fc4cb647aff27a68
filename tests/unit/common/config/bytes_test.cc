#include "common/config/bytes.h"

#include "gtest/gtest.h"

namespace tandem {
namespace {

TEST(ParseBytesTest, TakesPlainDecimalAndBinaryUnits) {
  EXPECT_EQ(*ParseBytes("0"), 0);
  EXPECT_EQ(*ParseBytes("1048576"), 1048576);
  EXPECT_EQ(*ParseBytes("2K"), 2000);
  EXPECT_EQ(*ParseBytes("2kB"), 2000);
  EXPECT_EQ(*ParseBytes("1.5GiB"), int64_t{3} << 29);
  EXPECT_EQ(*ParseBytes("512 MiB"), int64_t{512} << 20);
  EXPECT_EQ(*ParseBytes("1T"), int64_t{1'000'000'000'000});
  EXPECT_EQ(*ParseBytes("7B"), 7);
}

TEST(ParseBytesTest, RefusesWhatIsNoNumberOfBytes) {
  for (const char* text : {"", "abc", "-1", "1X", "1GiBB", "nan", "inf", "9e30", "1 2", "GiB"}) {
    EXPECT_FALSE(ParseBytes(text).ok()) << text;
  }
}

TEST(FormatBytesTest, PicksTheUnit) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(57344), "56.0 KiB");
  EXPECT_EQ(FormatBytes(192'512), "188 KiB");
  EXPECT_EQ(FormatBytes(1'048'575), "1.0 MiB");
  EXPECT_EQ(FormatBytes(int64_t{3} << 29), "1.5 GiB");
}

}  // namespace
}  // namespace tandem
