#include "router/core/load_summary.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::router {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1000);

TEST(LoadSummaryTest, ALineEachTenSecondsOfWhatHappened) {
  LoadSummary summary;
  EXPECT_TRUE(summary.Due(kStart));
  EXPECT_FALSE(summary.Take(kStart, {}).has_value());
  EXPECT_FALSE(summary.Due(kStart + absl::Seconds(9)));
  const absl::Time next = kStart + absl::Seconds(10);
  ASSERT_TRUE(summary.Due(next));
  const auto line = summary.Take(next, {.requests = 5,
                                        .prompt_tokens = 2000,
                                        .cached_tokens = 500,
                                        .generated_tokens = 1234,
                                        .running = 3,
                                        .waiting = 1,
                                        .kv_usage = 0.256});
  ASSERT_TRUE(line.has_value());
  EXPECT_EQ(LogLine(LogFormat::kText, kStart, "info", "router", "load", *line),
            "1970-01-01T00:16:40.000Z info  router: load seconds=10 requests_per_s=0.5 "
            "generated_tokens_per_s=123.4 prompt_tokens_per_s=200 running=3 waiting=1 "
            "kv_percent=25.6 hit_percent=25\n");
}

TEST(LoadSummaryTest, NothingWhereNothingRuns) {
  LoadSummary summary;
  LoadSample sample = {.requests = 5, .generated_tokens = 10, .kv_usage = 0.5};
  absl::Time now = kStart;
  EXPECT_FALSE(summary.Take(now, sample).has_value());
  EXPECT_FALSE(summary.Take(now += absl::Seconds(10), sample).has_value());
  // One that gets no token for long is load.
  sample.running = 1;
  EXPECT_TRUE(summary.Take(now += absl::Seconds(10), sample).has_value());
  // It has ended in time that was idle for the rest.
  sample.running = 0;
  sample.requests = 6;
  EXPECT_TRUE(summary.Take(now += absl::Seconds(10), sample).has_value());
  EXPECT_FALSE(summary.Take(now += absl::Seconds(10), sample).has_value());
}

}  // namespace
}  // namespace tandem::router
