#include "cli/loading.h"

#include "gtest/gtest.h"

namespace tandem::cli {
namespace {

const absl::Time kBegin = absl::UnixEpoch();

TEST(ParseLoadingLine, TakesTheOneLine) {
  const auto line = ParseLoadingLine("loading 5 20");
  ASSERT_TRUE(line.has_value());
  EXPECT_EQ(line->done, 5u);
  EXPECT_EQ(line->total, 20u);
  for (const char* other : {"loading 5", "loading 5 20 30", "loading a b", "listening 1 2", ""}) {
    EXPECT_FALSE(ParseLoadingLine(other).has_value()) << other;
  }
}

TEST(Loading, OneBarForAllWorkers) {
  Loading loading;
  EXPECT_FALSE(loading.active());
  loading.Report("prefill-0", {0, 8'000'000'000}, kBegin);
  loading.Report("decode-0", {0, 8'000'000'000}, kBegin);
  EXPECT_TRUE(loading.active());
  EXPECT_EQ(loading.worker_bytes(), 8'000'000'000u);
  loading.Report("prefill-0", {6'000'000'000, 8'000'000'000}, kBegin);
  loading.Report("decode-0", {2'000'000'000, 8'000'000'000}, kBegin);
  EXPECT_EQ(loading.Text(kBegin + absl::Seconds(4), 90),
            "loading 2 workers [=============>            ]  50 %, 8.0 of 16.0 GB, 2.0 GB/s, 4.0s "
            "left");
  loading.Forget("prefill-0");
  loading.Forget("decode-0");
  EXPECT_FALSE(loading.active());
  EXPECT_EQ(loading.worker_bytes(), 8'000'000'000u);
}

// A line as wide as the terminal would begin another one, and the bar could not be taken away.
TEST(Loading, IsNarrowerThanTheTerminal) {
  Loading loading;
  loading.Report("w", {1, 100'000'000'000'000}, kBegin);
  for (const int width : {20, 40, 60, 80, 120}) {
    EXPECT_LT(loading.Text(kBegin + absl::Hours(30), width).size(), static_cast<size_t>(width));
  }
}

}  // namespace
}  // namespace tandem::cli
