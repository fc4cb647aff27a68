#include "router/keys/rate_limit.h"

#include "gtest/gtest.h"

namespace tandem::router {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1'000'000);

TEST(RateLimitTest, AMinutesWorthAtOnceThenEvenly) {
  RateLimit limit(60);
  for (int i = 0; i < 60; ++i) {
    EXPECT_EQ(limit.Wait(kStart), absl::ZeroDuration()) << i;
    limit.Take(1, kStart);
  }
  EXPECT_EQ(limit.Wait(kStart), absl::Seconds(1));
  EXPECT_EQ(limit.Wait(kStart + absl::Milliseconds(400)), absl::Milliseconds(600));
  EXPECT_EQ(limit.Wait(kStart + absl::Seconds(1)), absl::ZeroDuration());
  limit.Take(1, kStart + absl::Seconds(1));
  EXPECT_EQ(limit.Wait(kStart + absl::Seconds(1)), absl::Seconds(1));
}

TEST(RateLimitTest, HoldsNoMoreThanAMinutesWorthHoweverLongNobodyAsked) {
  RateLimit limit(2);
  limit.Take(1, kStart);
  const absl::Time later = kStart + absl::Hours(5);
  limit.Take(2, later);
  EXPECT_EQ(limit.Wait(later), absl::Seconds(30));
}

TEST(RateLimitTest, DebtIsPaidBeforeAnythingElse) {
  RateLimit limit(100);
  limit.Take(1100, kStart);
  EXPECT_EQ(limit.Wait(kStart), absl::Minutes(10.01));
  EXPECT_EQ(limit.Wait(kStart + absl::Minutes(10.01)), absl::ZeroDuration());
}

TEST(RateLimitTest, LessThanOneAMinuteLetsOneIn) {
  RateLimit limit(0.5);
  EXPECT_EQ(limit.Wait(kStart), absl::ZeroDuration());
  limit.Take(1, kStart);
  EXPECT_EQ(limit.Wait(kStart), absl::Minutes(2));
}

TEST(RateLimitTest, ZeroIsNoLimit) {
  RateLimit limit;
  limit.Take(1e9, kStart);
  EXPECT_EQ(limit.Wait(kStart), absl::ZeroDuration());
}

TEST(RateLimitTest, AnotherRateForgetsNothing) {
  RateLimit limit(10);
  limit.Take(10, kStart);
  limit.SetRate(20, kStart);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(limit.Wait(kStart), absl::ZeroDuration());
    limit.Take(1, kStart);
  }
  EXPECT_EQ(limit.Wait(kStart), absl::Seconds(3));
  limit.SetRate(10, kStart);
  EXPECT_EQ(limit.Wait(kStart), absl::Seconds(66)) << "10 are owed now, and one more is wanted";
}

TEST(RateLimitTest, AClockThatGoesBackGivesNothing) {
  RateLimit limit(1);
  limit.Take(1, kStart);
  EXPECT_EQ(limit.Wait(kStart - absl::Hours(1)), absl::Minutes(1));
  EXPECT_EQ(limit.Wait(kStart + absl::Minutes(1)), absl::ZeroDuration());
}

}  // namespace
}  // namespace tandem::router
