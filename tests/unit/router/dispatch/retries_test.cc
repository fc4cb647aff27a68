#include "router/dispatch/retries.h"

#include <memory>

#include "gtest/gtest.h"

namespace tandem::router {
namespace {

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

WorkerView Worker(const std::string& id, uint64_t incarnation, absl::Time reported) {
  auto identity = std::make_shared<WorkerIdentity>();
  identity->id = id;
  identity->incarnation = incarnation;
  WorkerView view;
  view.identity = std::move(identity);
  view.load = std::make_shared<const LoadReport>();
  view.reported = reported;
  return view;
}

Route RouteTo(const std::string& id, uint64_t incarnation, absl::Time reported) {
  Route route;
  route.decode.id = id;
  route.incarnation = incarnation;
  route.reported = reported;
  return route;
}

TEST(Retries, ALostWorkerIsAvoidedForAMoment) {
  Retries retries;
  retries.Add(Retries::Kind::kLost, RouteTo("d", 1, kStart), kStart);
  const WorkerView worker = Worker("d", 1, kStart + absl::Seconds(1));
  EXPECT_EQ(retries.ExclusionOf(worker, kStart), Exclusion::kLost);
  const absl::Time again = retries.NextChange(kStart);
  EXPECT_EQ(retries.ExclusionOf(worker, again - absl::Milliseconds(1)), Exclusion::kLost);
  EXPECT_EQ(retries.ExclusionOf(worker, again), Exclusion::kNone);
  EXPECT_EQ(retries.NextChange(again), absl::InfiniteFuture());
}

TEST(Retries, AFullWorkerIsAvoidedUntilItReports) {
  Retries retries;
  retries.Add(Retries::Kind::kFull, RouteTo("d", 1, kStart), kStart);
  EXPECT_EQ(retries.ExclusionOf(Worker("d", 1, kStart), kStart), Exclusion::kFull);
  EXPECT_EQ(retries.ExclusionOf(Worker("d", 1, kStart + absl::Milliseconds(1)), kStart),
            Exclusion::kNone);
}

TEST(Retries, ANewProcessOfTheSameNameIsAnotherWorker) {
  Retries retries;
  retries.Add(Retries::Kind::kLost, RouteTo("d", 1, kStart), kStart);
  EXPECT_EQ(retries.ExclusionOf(Worker("d", 2, kStart), kStart), Exclusion::kNone);
  EXPECT_EQ(retries.ExclusionOf(Worker("e", 1, kStart), kStart), Exclusion::kNone);
}

TEST(Retries, FullWorkersDoNotCountAsLosses) {
  Retries retries;
  for (int i = 0; i < 10; ++i) {
    retries.Add(Retries::Kind::kFull, RouteTo("d", 1, kStart), kStart);
  }
  EXPECT_TRUE(retries.may_try_again());
  EXPECT_FALSE(retries.HasLost());
  for (int i = 0; i < Retries::kMaxLost; ++i) {
    EXPECT_TRUE(retries.may_try_again());
    retries.Add(Retries::Kind::kLost, RouteTo("d", 1, kStart), kStart);
  }
  EXPECT_FALSE(retries.may_try_again());
  EXPECT_EQ(retries.lost(), Retries::kMaxLost);
}

TEST(Retries, OnlyStatusesThatBlameTheRequestAreFinal) {
  EXPECT_TRUE(MayBeLost(absl::UnavailableError("")));
  EXPECT_TRUE(MayBeLost(absl::CancelledError("")));
  EXPECT_FALSE(MayBeLost(absl::InvalidArgumentError("")));
  EXPECT_FALSE(MayBeLost(absl::DeadlineExceededError("")));
  EXPECT_FALSE(MayBeLost(absl::ResourceExhaustedError("")));
}

}  // namespace
}  // namespace tandem::router
