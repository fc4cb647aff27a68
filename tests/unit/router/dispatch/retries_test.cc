#include "router/dispatch/retries.h"

#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace tandem::router {
namespace {

const absl::Time kStart = absl::UnixEpoch() + absl::Hours(1);

WorkerView Worker(const std::string& id, uint64_t incarnation, absl::Time reported,
                  int admits_blocks = 0) {
  auto identity = std::make_shared<WorkerIdentity>();
  identity->id = id;
  identity->incarnation = incarnation;
  WorkerView view;
  view.identity = std::move(identity);
  LoadReport load;
  load.admits_blocks = admits_blocks;
  view.load = std::make_shared<const LoadReport>(load);
  view.reported = reported;
  return view;
}

Route RouteTo(const std::string& id, uint64_t incarnation, absl::Time reported) {
  Route route;
  route.decode.id = id;
  route.decode.incarnation = incarnation;
  route.reported = reported;
  return route;
}

TEST(Retries, ALostWorkerIsAvoidedForAMoment) {
  Retries retries;
  retries.AddLost(RouteTo("d", 1, kStart), kStart);
  const WorkerView worker = Worker("d", 1, kStart + absl::Seconds(1));
  EXPECT_EQ(retries.ExclusionOf(worker, kStart), Exclusion::kLost);
  const absl::Time again = retries.NextChange(kStart);
  EXPECT_EQ(retries.ExclusionOf(worker, again - absl::Milliseconds(1)), Exclusion::kLost);
  EXPECT_EQ(retries.ExclusionOf(worker, again), Exclusion::kNone);
  EXPECT_EQ(retries.NextChange(again), absl::InfiniteFuture());
}

constexpr Refusal kNeeds20 = {Refusal::Reason::kBlocks, 20, 5};

TEST(Retries, AFullWorkerIsAvoidedUntilItReportsTheRoomThatWasLacking) {
  Retries retries;
  retries.AddRefused(RouteTo("d", 1, kStart), kNeeds20, kStart);
  const auto exclusion = [&](absl::Time reported, int admits) {
    return retries.ExclusionOf(Worker("d", 1, reported, admits), kStart);
  };
  const absl::Time later = kStart + absl::Milliseconds(1);
  EXPECT_EQ(exclusion(kStart, 100), Exclusion::kFull);  // that report was wrong
  EXPECT_EQ(exclusion(later, 19), Exclusion::kFull);
  EXPECT_EQ(exclusion(later, 20), Exclusion::kNone);
}

// Whatever the reports say: every worker promises room and refuses.
TEST(Retries, RefusalsInARowMakeFewerThanFiveTriesInAnySecond) {
  Retries retries;
  absl::Time now = kStart;
  std::vector<absl::Time> tries;
  while (now < kStart + absl::Seconds(10)) {
    const std::string worker = "d" + std::to_string(tries.size() % 8);
    if (now >= retries.held_until() &&
        retries.ExclusionOf(Worker(worker, 1, now, 100), now) == Exclusion::kNone) {
      tries.push_back(now);
      retries.AddRefused(RouteTo(worker, 1, now), kNeeds20, now);
      continue;
    }
    now += absl::Milliseconds(1);
  }
  for (size_t i = 0; i < tries.size(); ++i) {
    size_t next = i;
    while (next < tries.size() && tries[next] - tries[i] < absl::Seconds(1)) ++next;
    EXPECT_LT(next - i, 5u) << "from " << tries[i] - kStart;
  }
  EXPECT_GT(tries.size(), 8u);  // and it is not forgotten
}

TEST(Retries, AFullPrefillWorkerIsNotHeldAgainstTheDecodeWorker) {
  Retries retries;
  retries.AddRefused(RouteTo("d", 1, kStart), {.reason = Refusal::Reason::kPrefill}, kStart);
  EXPECT_EQ(retries.ExclusionOf(Worker("d", 1, kStart), kStart), Exclusion::kNone);
  EXPECT_GT(retries.held_until(), kStart);
  EXPECT_EQ(retries.NextChange(kStart), retries.held_until());
}

// One that was only stopped is usable again soon, and may yet lose the connections of that time:
// the request would be told of two lost workers where there was one.
TEST(Retries, APrefillWorkerThatWasLostIsNotTheFirstChoiceAgain) {
  Retries retries;
  Route route = RouteTo("d", 1, kStart);
  route.prefill = {{.id = "q", .incarnation = 7}, {.id = "p", .incarnation = 7}};
  retries.AddRefused(route, {.reason = Refusal::Reason::kPrefill, .lost = 0b10}, kStart);
  const absl::Time later = kStart + absl::Seconds(5);
  EXPECT_EQ(retries.ExclusionOf(Worker("p", 7, later), later), Exclusion::kSuspect);
  EXPECT_EQ(retries.ExclusionOf(Worker("q", 7, later), later), Exclusion::kNone);
  EXPECT_EQ(retries.ExclusionOf(Worker("d", 1, later), later), Exclusion::kNone);
}

TEST(Retries, ANewProcessOfTheSameNameIsAnotherWorker) {
  Retries retries;
  retries.AddLost(RouteTo("d", 1, kStart), kStart);
  EXPECT_EQ(retries.ExclusionOf(Worker("d", 2, kStart), kStart), Exclusion::kNone);
  EXPECT_EQ(retries.ExclusionOf(Worker("e", 1, kStart), kStart), Exclusion::kNone);
}

TEST(Retries, FullWorkersDoNotCountAsLosses) {
  Retries retries;
  for (int i = 0; i < 10; ++i) {
    retries.AddRefused(RouteTo("d", 1, kStart), kNeeds20, kStart);
  }
  EXPECT_TRUE(retries.may_try_again());
  EXPECT_FALSE(retries.HasLost());
  EXPECT_EQ(retries.may_lose(), 2);
  retries.AddLost(RouteTo("d", 1, kStart), kStart);
  EXPECT_TRUE(retries.may_try_again());
  EXPECT_EQ(retries.may_lose(), 1);
  retries.AddLost(RouteTo("d", 2, kStart), kStart);
  EXPECT_FALSE(retries.may_try_again());
}

ClusterView ViewOf(std::vector<WorkerView> workers) {
  ClusterView view;
  view.workers = std::move(workers);
  return view;
}

// A worker that is stopped for a while loses its connections one after the other, and each is the
// loss of the same process.
TEST(Retries, AProcessThatIsLostTwiceIsOneLostWorker) {
  Retries retries;
  Route route = RouteTo("d", 1, kStart);
  route.prefill = {{.id = "p", .incarnation = 7}};
  const Refusal lost = {.reason = Refusal::Reason::kPrefill, .lost = 1};
  retries.AddRefused(route, lost, kStart);
  retries.AddRefused(route, lost, kStart + absl::Seconds(1));
  EXPECT_EQ(retries.lost(), 1);
  EXPECT_TRUE(retries.may_try_again());
  EXPECT_EQ(retries.may_lose(), 1);
  route.prefill.front().incarnation = 8;
  retries.AddRefused(route, lost, kStart + absl::Seconds(2));
  EXPECT_EQ(retries.lost(), 2);
}

TEST(Retries, WhoGoesOnWasNotLost) {
  Retries retries;
  retries.AddLost(RouteTo("d", 1, kStart), kStart);
  retries.AddLost(RouteTo("e", 1, kStart), kStart);
  const auto look = [&](absl::Time d, absl::Time e) {
    std::vector<WorkerView> workers = {Worker("d", 1, d), Worker("e", 1, e)};
    for (WorkerView& worker : workers) worker.progressed = worker.reported;
    retries.LookFor(ViewOf(std::move(workers)));
  };
  // What may have been on its way when it died is no sign of life.
  const absl::Time soon = kStart + absl::Milliseconds(10), later = kStart + absl::Seconds(1);
  look(soon, soon);
  EXPECT_EQ(retries.lost(), 2);
  EXPECT_TRUE(retries.in_doubt());
  look(soon, later);
  EXPECT_EQ(retries.lost(), 1);
  EXPECT_TRUE(retries.may_try_again());
  EXPECT_FALSE(retries.in_doubt());
  retries.LookFor(ViewOf({}));
  EXPECT_EQ(retries.lost(), 2);
  EXPECT_FALSE(retries.in_doubt());
}

// Whatever the workers say of themselves: a request has an end.
TEST(Retries, WorkersThatLiveAndBreakEveryCallAreNotTriedForever) {
  struct Case {
    absl::Duration between;  // two calls that break
    int tries;
  };
  const absl::Duration slow = Retries::kMaxBrokenFor / (Retries::kMaxBrokenSlowly - 1);
  for (const Case& c :
       {Case{absl::Milliseconds(1), Retries::kMaxBroken}, Case{Retries::kMaxBrokenFor / 8, 9},
        Case{slow, Retries::kMaxBrokenSlowly}, Case{absl::Minutes(1), Retries::kMaxBrokenSlowly}}) {
    Retries retries;
    absl::Time now = kStart;
    int tries = 0;
    while (retries.may_try_again() && tries < 100) {
      retries.AddLost(RouteTo("d", 1, now), now);
      now += c.between;
      WorkerView alive = Worker("d", 1, now);
      alive.progressed = now;
      retries.LookFor(ViewOf({alive}));
      ++tries;
    }
    EXPECT_EQ(tries, c.tries) << c.between;
    EXPECT_FALSE(retries.in_doubt());
  }
}

TEST(Retries, AProcessThatIsLostAgainIsAvoidedForLonger) {
  Retries retries;
  absl::Duration before = absl::ZeroDuration();
  for (int i = 0; i < 3; ++i) {
    retries.AddLost(RouteTo("d", 1, kStart), kStart);
    const absl::Duration avoided = retries.NextChange(kStart) - kStart;
    EXPECT_GT(avoided, before);
    before = avoided;
  }
}

TEST(Retries, OnlyALostWorkerIsReasonToTryAnother) {
  EXPECT_TRUE(MayBeLost(absl::UnavailableError("")));
  EXPECT_TRUE(MayBeLost(absl::CancelledError("")));
  EXPECT_FALSE(MayBeLost(absl::InvalidArgumentError("")));
  EXPECT_FALSE(MayBeLost(absl::DeadlineExceededError("")));
  EXPECT_FALSE(MayBeLost(absl::ResourceExhaustedError("")));
  EXPECT_FALSE(MayBeLost(absl::InternalError("")));
  EXPECT_FALSE(MayBeLost(absl::AbortedError("")));
}

}  // namespace
}  // namespace tandem::router
