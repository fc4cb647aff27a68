// The queue in front of a cluster that a test makes up: who waits for what, and how long. One
// thread drives the dispatcher, under a clock that stands still.
#include "router/dispatch/dispatcher.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/refusal.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "simulation/fake_clock.h"
#include "tandem/internal/v1/cluster.pb.h"
#include "tests/support/paths.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Gives out as many places as a test allows; without workers it has none to give.
class ScriptedPolicy : public RoutingPolicy {
 public:
  absl::StatusOr<Route> Choose(const ClusterView&, const RouteQuery& query) const override {
    queries.push_back({query.prompt_tokens, {query.excluded.begin(), query.excluded.end()}});
    if (!workers) return Unavailable("nobody there");
    if (places == 0) return ResourceExhausted("full");
    if (query.prompt_tokens > 2 && places_to_ask == 0) {
      return WithRefusal(ResourceExhausted("promised"), {.reason = Refusal::Reason::kPrefill});
    }
    --places;
    Route route;
    route.decode.id = "d";
    route.wait_ms = wait_ms;
    return route;
  }

  bool workers = true;
  mutable int places = 0;
  int places_to_ask = 1;  // 0: only for prompts of up to two tokens
  double wait_ms = 0;
  struct Query {
    int prompt_tokens;
    std::vector<Exclusion> excluded;
  };
  mutable std::vector<Query> queries;
};

class Waiting : public Dispatchable {
 public:
  Waiting(std::string name, int priority, std::vector<std::string>* started, size_t tokens = 3)
      : name_(std::move(name)), tokens_(tokens), priority_(priority), started_(started) {}
  RoutablePrompt prompt() const override {
    return {name_, tokens_, "", priority_, absl::UnixEpoch(), deadline};
  }
  void Start(const Route&) override { started_->push_back(name_); }
  void Fail(const absl::Status& status) override { failed = status; }

  absl::Status failed;
  absl::Time deadline = absl::InfiniteFuture();

 private:
  const std::string name_;
  const std::vector<int32_t> tokens_;
  const int priority_;
  std::vector<std::string>* const started_;
};

class DispatcherTest : public ::testing::Test {
 protected:
  DispatcherTest() {
    options_.no_worker_timeout = absl::Seconds(5);
    options_.queue_timeout = absl::Seconds(60);
  }
  void Make() {
    dispatcher_ = std::make_unique<Dispatcher>(options_, &registry_, &index_, &policy_,
                                               &router_metrics_, &clock_);
  }
  std::shared_ptr<Waiting> Submit(const std::string& name, int priority = 0) {
    auto request = std::make_shared<Waiting>(name, priority, &started_);
    EXPECT_OK(dispatcher_->Submit(request, &ticket_));
    return request;
  }
  void Step() { dispatcher_->Step(absl::ZeroDuration()); }
  void Advance(absl::Duration by) {
    clock_.Advance(by);
    Step();
  }

  FakeClock clock_;
  PrefixIndex index_;
  Registry registry_{{.model = "m"}, &index_, &clock_};
  Metrics metrics_;
  RouterMetrics router_metrics_{&metrics_};
  ScriptedPolicy policy_;
  DispatcherOptions options_;
  std::vector<std::string> started_;
  Dispatcher::Ticket ticket_ = 0;  // of the last Submit
  std::unique_ptr<Dispatcher> dispatcher_;
};

TEST_F(DispatcherTest, WhoStandsBehindAFullClusterWaitsForRoomNotForWorkers) {
  Make();
  policy_.workers = false;
  const auto a = Submit("a"), b = Submit("b"), c = Submit("c");
  Step();  // all of them have met an empty cluster
  policy_.workers = true;
  policy_.places = 1;
  Step();
  EXPECT_THAT(started_, ElementsAre("a"));
  Advance(absl::Seconds(6));
  EXPECT_EQ(dispatcher_->queued(), 2);
  Advance(absl::Seconds(60));
  EXPECT_EQ(dispatcher_->queued(), 0);
  EXPECT_THAT(started_, ElementsAre("a"));
  for (const auto& request : {b, c}) {
    EXPECT_EQ(request->failed.code(), absl::StatusCode::kResourceExhausted) << request->failed;
    EXPECT_THAT(MessageOf(request->failed), HasSubstr("--queue-timeout"));
  }
}

TEST_F(DispatcherTest, WithoutWorkersTheWaitIsShort) {
  Make();
  policy_.workers = false;
  const auto a = Submit("a");
  Step();
  Advance(absl::Milliseconds(4999));
  EXPECT_OK(a->failed);
  Advance(absl::Milliseconds(1));
  EXPECT_EQ(a->failed.code(), absl::StatusCode::kUnavailable);
}

TEST_F(DispatcherTest, HigherPriorityGoesFirstAndThenWhoCameFirst) {
  Make();
  Submit("late");
  Submit("later");
  Submit("urgent", 1);
  policy_.places = 3;
  Step();
  EXPECT_THAT(started_, ElementsAre("urgent", "late", "later"));
}

TEST_F(DispatcherTest, AFullQueueRefusesAndSaysWhenToComeBack) {
  options_.max_queued_requests = 1;
  Make();
  Submit("a");
  auto request = std::make_shared<Waiting>("b", 0, &started_);
  Dispatcher::Ticket ticket = 0;
  const absl::Status full = dispatcher_->Submit(request, &ticket);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(RetryAfter(full).has_value());
  EXPECT_EQ(dispatcher_->queued(), 1);
}

TEST_F(DispatcherTest, WhoMayJoinIsKnownBeforeThePromptIs) {
  options_.max_queued_requests = 100;
  options_.max_wait = absl::Seconds(1);
  Make();
  for (int i = 0; i < 50; ++i) Submit("one");
  // Ten a second go.
  for (int tick = 0; tick < 20; ++tick) {
    policy_.places = 1;
    Advance(absl::Milliseconds(100));
  }
  const absl::Time never = absl::InfiniteFuture();
  const absl::Status late = dispatcher_->MayJoin(0, never);
  EXPECT_EQ(late.code(), absl::StatusCode::kResourceExhausted) << late;
  EXPECT_THAT(std::string(late.message()), HasSubstr("its turn would come in 2.9"));
  EXPECT_TRUE(RetryAfter(late).has_value());
  EXPECT_OK(dispatcher_->MayJoin(1, never));  // a class is worth five seconds
  EXPECT_FALSE(dispatcher_->MayJoin(1, clock_.Now() + absl::Seconds(1)).ok());
  EXPECT_EQ(dispatcher_->queued(), 30);
}

TEST_F(DispatcherTest, TheQueueIsBoundedInTokensToo) {
  options_.max_queued_tokens = 7;  // of three each
  Make();
  Submit("a");
  const Dispatcher::Ticket first = ticket_;
  Submit("b");
  auto request = std::make_shared<Waiting>("c", 0, &started_);
  Dispatcher::Ticket ticket = 0;
  const absl::Status full = dispatcher_->Submit(request, &ticket);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(MessageOf(full), HasSubstr("--max-queued-tokens"));
  EXPECT_TRUE(RetryAfter(full).has_value());
  Step();
  dispatcher_->Ended(first);
  Step();
  EXPECT_OK(dispatcher_->Submit(request, &ticket));
  policy_.places = 2;
  Step();
  EXPECT_EQ(dispatcher_->queued(), 0);
  Submit("d");
  Submit("e");
}

TEST_F(DispatcherTest, ARequestThatEndsInTheQueueIsNeitherStartedNorFailed) {
  Make();
  const auto a = Submit("a");
  dispatcher_->Ended(ticket_);
  policy_.places = 1;
  Step();
  EXPECT_EQ(dispatcher_->queued(), 0);
  EXPECT_TRUE(started_.empty());
  EXPECT_OK(a->failed);
}

TEST_F(DispatcherTest, ARequestThatComesBackKeepsItsPlaceInTheLine) {
  Make();
  policy_.places = 1;
  const auto a = Submit("a");
  const Dispatcher::Ticket first = ticket_;
  Step();
  Submit("b");
  Retries retries;
  Route route;
  route.decode.id = "d";
  retries.AddRefused(route, {}, clock_.Now());
  dispatcher_->Requeue(a, first, clock_.Now(), retries);
  policy_.places = 2;
  Step();
  EXPECT_THAT(started_, ElementsAre("a", "a", "b"));
}

// One worker with so many tokens of room, and requests that give theirs back after a second.
class RoomPolicy : public RoutingPolicy {
 public:
  absl::StatusOr<Route> Choose(const ClusterView&, const RouteQuery& query) const override {
    if (query.prompt_tokens > room) return ResourceExhausted("full");
    room -= query.prompt_tokens;
    Route route;
    route.decode.id = "d";
    return route;
  }
  mutable int room = 0;
};

class Sized : public Dispatchable {
 public:
  Sized(int tokens, int priority, absl::Time now, Clock* clock)
      : tokens_(static_cast<size_t>(tokens)), priority_(priority), arrived(now), clock_(clock) {}
  RoutablePrompt prompt() const override { return {"s", tokens_, "", priority_, arrived}; }
  void Start(const Route&) override { started = clock_->Now(); }
  void Fail(const absl::Status&) override {}
  int size() const { return static_cast<int>(tokens_.size()); }

 private:
  const std::vector<int32_t> tokens_;
  const int priority_;

 public:
  const absl::Time arrived;
  absl::Time started = absl::InfiniteFuture();
  bool ended = false;

 private:
  Clock* const clock_;
};

class QueueSimulation : public DispatcherTest {
 protected:
  void Start(int room) {
    options_.queue_timeout = absl::Minutes(10);
    options_.max_wait = absl::InfiniteDuration();
    room_.room = room;
    dispatcher_ = std::make_unique<Dispatcher>(options_, &registry_, &index_, &room_,
                                               &router_metrics_, &clock_);
  }
  std::shared_ptr<Sized> Add(int tokens, int priority = 0) {
    auto request = std::make_shared<Sized>(tokens, priority, clock_.Now(), &clock_);
    EXPECT_OK(dispatcher_->Submit(request, &ticket_));
    requests_.push_back(request);
    return request;
  }
  // 10 ms; who was started a second ago ends.
  void Tick() {
    clock_.Advance(absl::Milliseconds(10));
    for (const auto& request : requests_) {
      if (request->ended || clock_.Now() < request->started + absl::Seconds(1)) continue;
      request->ended = true;
      room_.room += request->size();
    }
    Step();
  }

  RoomPolicy room_;
  std::vector<std::shared_ptr<Sized>> requests_;
};

TEST_F(QueueSimulation, SmallOnesPassABigOneAndDoNotStarveIt) {
  Start(1000);
  const auto running = Add(600);
  Step();
  const auto big = Add(900);
  absl::Duration longest_small;
  for (int tick = 0; tick < 1000; ++tick) {
    const auto small = Add(10);  // one every 10 ms: as much as there is, for ever
    Tick();
    // Those that there was room for.
    if (tick < 35) longest_small = std::max(longest_small, small->started - small->arrived);
  }
  std::printf("small ones wait %.0f ms beside a big one that waits; it waits %.0f ms\n",
              absl::ToDoubleMilliseconds(longest_small),
              absl::ToDoubleMilliseconds(big->started - big->arrived));
  EXPECT_LE(longest_small, absl::Milliseconds(20));
  EXPECT_LE(big->started - big->arrived, absl::Seconds(4));
}

TEST_F(QueueSimulation, AHigherClassGoesFirstAndNobodyStarves) {
  Start(100);  // ten at a time
  std::vector<std::shared_ptr<Sized>> victims, urgent;
  for (int tick = 0; tick < 3000; ++tick) {
    if (tick == 100) {
      for (int i = 0; i < 4; ++i) victims.push_back(Add(10));
    }
    if (tick % 5 == 0) urgent.push_back(Add(10, 2));  // twice what there is room for
    Tick();
  }
  absl::Duration longest;
  for (const auto& victim : victims) longest = std::max(longest, victim->started - victim->arrived);
  std::printf("of the lower class the longest waits %.1f s\n", absl::ToDoubleSeconds(longest));
  EXPECT_LE(longest, absl::Seconds(25));
  // But while it is fresh it stands behind.
  EXPECT_GT(victims[0]->started - victims[0]->arrived, absl::Seconds(1));
}

// Requests that hold their room for a second, at so many times what there is room for; a good one
// starts within two seconds.
class OverloadTest : public QueueSimulation, public ::testing::WithParamInterface<int> {};

TEST_P(OverloadTest, WhatIsTakenIsServedInTimeAndTheRestIsToldAtOnce) {
  Start(100);  // ten requests a second
  options_.max_wait = absl::Seconds(1);
  dispatcher_ = std::make_unique<Dispatcher>(options_, &registry_, &index_, &room_,
                                             &router_metrics_, &clock_);
  constexpr int kSeconds = 60;
  int good = 0, late = 0, refused = 0;
  size_t most_queued = 0;
  for (int tick = 0; tick < kSeconds * 100; ++tick) {
    for (int i = 0; i < GetParam(); ++i) {
      if (tick % 10 != 0) break;
      auto request = std::make_shared<Sized>(10, 0, clock_.Now(), &clock_);
      const absl::Status status = dispatcher_->Submit(request, &ticket_);
      if (status.ok()) {
        requests_.push_back(request);
      } else {
        ++refused;
        EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
        EXPECT_TRUE(RetryAfter(status).has_value());
      }
    }
    most_queued = std::max(most_queued, static_cast<size_t>(dispatcher_->queued()));
    Tick();
  }
  for (const auto& request : requests_) {
    if (request->started == absl::InfiniteFuture()) continue;
    ++(request->started - request->arrived <= absl::Seconds(2) ? good : late);
  }
  std::printf("%d times the capacity: %d good, %d late, %d refused, %zu queued at most\n",
              GetParam(), good, late, refused, most_queued);
  EXPECT_GE(good, (GetParam() <= 2 ? 9 : 8) * kSeconds);  // of ten a second
  EXPECT_GT(refused, (GetParam() - 2) * 10 * kSeconds);
  EXPECT_LE(most_queued, 100u);
}

INSTANTIATE_TEST_SUITE_P(Times, OverloadTest, ::testing::Values(1, 2, 10));

TEST_F(DispatcherTest, WhoCannotBeServedBeforeItsDeadlineIsRefusedAtOnce) {
  Make();
  policy_.wait_ms = 500;
  policy_.places = 3;
  const auto patient = std::make_shared<Waiting>("patient", 0, &started_);
  const auto hasty = std::make_shared<Waiting>("hasty", 0, &started_);
  hasty->deadline = clock_.Now() + absl::Milliseconds(400);
  EXPECT_OK(dispatcher_->Submit(patient, &ticket_));
  EXPECT_OK(dispatcher_->Submit(hasty, &ticket_));
  Step();
  EXPECT_THAT(started_, ElementsAre("patient"));
  EXPECT_EQ(hasty->failed.code(), absl::StatusCode::kResourceExhausted) << hasty->failed;
  EXPECT_TRUE(RetryAfter(hasty->failed).has_value());
  policy_.wait_ms = 31'000;
  policy_.places = 2;
  const auto late = std::make_shared<Waiting>("late", 0, &started_);
  const auto urgent = std::make_shared<Waiting>("urgent", 1, &started_);  // came 5 s earlier
  EXPECT_OK(dispatcher_->Submit(late, &ticket_));
  EXPECT_OK(dispatcher_->Submit(urgent, &ticket_));
  Step();
  EXPECT_THAT(started_, ElementsAre("patient", "urgent"));
  EXPECT_THAT(MessageOf(late->failed), HasSubstr("--max-wait"));
}

// What lacks only the turn of a prefill worker holds back who needs one too, and nobody else.
TEST_F(DispatcherTest, PromisedRoomHoldsBackOnlyThoseThatWouldWaitAsWell) {
  WorkerIdentity identity;
  identity.id = "d";
  identity.role = WorkerRole::kDecode;
  identity.local_prefill_max_tokens = 2;
  internal::v1::Capability capability;
  capability.set_model("m");
  capability.set_model_digest("digest");
  capability.set_block_size(16);
  ASSERT_OK(registry_.Join(identity, capability, [] {}));
  Make();
  policy_.places = 2;
  policy_.places_to_ask = 0;
  std::vector<std::shared_ptr<Waiting>> asking;
  for (int i = 0; i < 20; ++i) asking.push_back(Submit("asks"));  // three tokens
  Advance(absl::Seconds(2));
  auto local = std::make_shared<Waiting>("local", 0, &started_, 2);
  EXPECT_OK(dispatcher_->Submit(local, &ticket_));
  Step();
  EXPECT_THAT(started_, ElementsAre("local"));
}

TEST_F(DispatcherTest, AFullClusterIsAskedOncePerTurnNotOncePerRequest) {
  Make();
  for (int i = 0; i < 10; ++i) Submit(std::to_string(i));
  Step();
  EXPECT_EQ(policy_.queries.size(), 1u);
}

// A prefill worker that failed a decode worker's prompt is asked again after 1, 2, 4 ... 30 s.
TEST_F(DispatcherTest, APrefillWorkerThatFailsIsAvoidedForAGrowingTime) {
  Make();
  const auto join = [&](const std::string& id, WorkerRole role) {
    internal::v1::Capability capability;
    capability.set_model("m");
    capability.set_block_size(16);
    WorkerIdentity identity;
    identity.id = id;
    identity.role = role;
    auto member = registry_.Join(std::move(identity), capability, {});
    EXPECT_OK(member);
    return *member;
  };
  const Registry::Member decode = join("d", WorkerRole::kDecode);
  join("p", WorkerRole::kPrefill);
  clock_.Advance(absl::Hours(1));
  const auto excluded_after = [&](int failures, absl::Duration ago) {
    LoadReport load;
    load.prefill_failures["p"] = {failures, 0};
    registry_.Report(decode, load);
    clock_.Advance(ago);
    load.prefill_failures["p"].seconds_ago = absl::ToDoubleSeconds(ago);
    registry_.Report(decode, load);
    Submit("x");
    policy_.places = 1;
    Step();
    return policy_.queries.back().excluded[1];
  };
  EXPECT_EQ(excluded_after(1, absl::Milliseconds(900)), Exclusion::kSuspect);
  EXPECT_EQ(excluded_after(1, absl::Milliseconds(1100)), Exclusion::kNone);
  EXPECT_EQ(excluded_after(3, absl::Milliseconds(3900)), Exclusion::kSuspect);
  EXPECT_EQ(excluded_after(3, absl::Milliseconds(4100)), Exclusion::kNone);
  EXPECT_EQ(excluded_after(50, absl::Seconds(29)), Exclusion::kSuspect);
  EXPECT_EQ(excluded_after(50, absl::Seconds(31)), Exclusion::kNone);
}

TEST_F(DispatcherTest, WhatIsQueuedAtTheEndFails) {
  Make();
  const auto a = Submit("a");
  Step();
  const auto b = Submit("b");
  dispatcher_.reset();
  EXPECT_EQ(a->failed.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(b->failed.code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace tandem::router
