// The queue in front of a cluster that a test makes up: who waits for what, and how long.
#include "router/stream/dispatcher.h"

#include <functional>
#include <memory>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "tests/fakes/fake_clock.h"
#include "tests/support/paths.h"
#include "tests/unit/router/fake_worker.h"

namespace tandem::router {
namespace {

// Gives out as many places as a test allows, and counts how often it was asked.
class ScriptedPolicy : public RoutingPolicy {
 public:
  absl::StatusOr<RouteChoice> Choose(const ClusterView& view, const RouteQuery&) const override {
    absl::MutexLock lock(&mutex_);
    ++asked_;
    if (view.workers.empty()) return Unavailable("nobody there");
    if (places_ == 0) return ResourceExhausted("full");
    --places_;
    RouteChoice choice;
    choice.decode = 0;
    return choice;
  }
  void Allow(int places) {
    absl::MutexLock lock(&mutex_);
    places_ = places;
  }
  int asked() const {
    absl::MutexLock lock(&mutex_);
    return asked_;
  }
  void AwaitAsked(int times) const {
    absl::MutexLock lock(&mutex_);
    const auto reached = [&] { return asked_ >= times; };
    mutex_.Await(absl::Condition(&reached));
  }

 private:
  mutable absl::Mutex mutex_;
  mutable int asked_ = 0;
  mutable int places_ = 0;
};

class Waiting : public Dispatchable {
 public:
  Waiting() { request_.tokens = {1, 2, 3}; }
  const Request& request() const override { return request_; }
  void Start(const Assignment&) override { started_ = true; }
  void Fail(const absl::Status& status) override { failed_ = status; }

  // Only while the dispatcher is gone or known to stand still.
  bool started() const { return started_; }
  const absl::Status& failed() const { return failed_; }

 private:
  Request request_;
  bool started_ = false;
  absl::Status failed_;
};

TEST(Dispatcher, WhoStandsBehindAFullClusterWaitsForRoomNotForWorkers) {
  FakeClock clock;
  PrefixIndex index;
  Registry registry({"m", "", 0, ""}, &index, &clock);
  Metrics metrics;
  RouterMetrics router_metrics(&metrics);
  ScriptedPolicy policy;
  DispatcherOptions options;
  options.no_worker_timeout = absl::Seconds(5);
  options.queue_timeout = absl::Seconds(60);
  std::vector<std::shared_ptr<Waiting>> requests;
  {
    Dispatcher dispatcher(options, &registry, &index, &policy, &router_metrics, &clock);
    // One turn of the dispatcher has ended when the next one has asked the policy.
    const auto turn = [&] {
      for (int i = 0; i < 2; ++i) {
        const int asked = policy.asked();
        dispatcher.Kick();
        policy.AwaitAsked(asked + 1);
      }
    };
    for (int i = 0; i < 3; ++i) {
      requests.push_back(std::make_shared<Waiting>());
      Dispatcher::Ticket ticket = 0;
      ASSERT_OK(dispatcher.Submit(requests.back(), &ticket));
    }
    policy.AwaitAsked(3);
    turn();  // all of them have met an empty cluster
    policy.Allow(1);
    WorkerIdentity identity;
    identity.id = "d";
    ASSERT_OK(registry.Join(identity, FakeCapability("m", 512), nullptr));
    turn();
    clock.Advance(absl::Seconds(6));
    turn();
    EXPECT_EQ(dispatcher.queued(), 2);
    clock.Advance(absl::Seconds(60));
    dispatcher.Kick();
    const absl::Time limit = absl::Now() + absl::Seconds(20);
    while (dispatcher.queued() > 0) {
      ASSERT_LT(absl::Now(), limit);
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  EXPECT_TRUE(requests[0]->started());
  for (int i = 1; i < 3; ++i) {
    EXPECT_FALSE(requests[i]->started());
    EXPECT_EQ(requests[i]->failed().code(), absl::StatusCode::kResourceExhausted)
        << requests[i]->failed();
  }
}

}  // namespace
}  // namespace tandem::router
