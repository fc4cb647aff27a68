// The queue in front of a cluster that a test makes up: who waits for what, and how long. One
// thread drives the dispatcher, under a clock that stands still.
#include "router/dispatch/dispatcher.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "common/rpc/status.h"
#include "tandem/internal/v1/cluster.pb.h"
#include "tests/fakes/fake_clock.h"
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
    --places;
    Route route;
    route.decode.id = "d";
    return route;
  }

  bool workers = true;
  mutable int places = 0;
  struct Query {
    int prompt_tokens;
    std::vector<Exclusion> excluded;
  };
  mutable std::vector<Query> queries;
};

class Waiting : public Dispatchable {
 public:
  Waiting(std::string name, int priority, std::vector<std::string>* started)
      : name_(std::move(name)), priority_(priority), started_(started) {}
  RoutablePrompt prompt() const override { return {name_, tokens_, "", priority_}; }
  void Start(const Route&) override { started_->push_back(name_); }
  void Fail(const absl::Status& status) override { failed = status; }

  absl::Status failed;

 private:
  const std::string name_;
  const std::vector<int32_t> tokens_ = {1, 2, 3};
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
  Registry registry_{{"m", "", 0, ""}, &index_, &clock_};
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
