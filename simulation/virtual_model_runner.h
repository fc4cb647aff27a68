// A fake runner whose steps take virtual time, which a cost function says.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>

#include "absl/time/time.h"

#include "common/base/clock.h"
#include "engine/runtime/model_runner.h"
#include "simulation/step_time.h"

namespace tandem {

// The clock as one worker's loop sees it. A turn of the loop happens at one moment of the shared
// clock; waiting for the device moves the loop's own time ahead of it. What the loop says then is
// said at its own time, and its next turn comes no sooner.
class WorkerClock final : public Clock {
 public:
  explicit WorkerClock(Clock* shared) : shared_(shared) {}

  // In a turn the loop's own time, else, for whoever else lives in the worker, the shared one.
  absl::Time Now() override { return in_turn_ ? std::max(own_, shared_->Now()) : shared_->Now(); }
  void BeginTurn() {
    own_ = shared_->Now();
    in_turn_ = true;
  }
  void WaitUntil(absl::Time when) { own_ = std::max(own_, when); }
  absl::Time EndTurn() {
    in_turn_ = false;
    return own_;
  }
  bool in_turn() const { return in_turn_; }

 private:
  Clock* const shared_;
  absl::Time own_;
  bool in_turn_ = false;
};

// When something is ready, though the bytes are there sooner in the simulation.
class ScheduledEvent final : public ReadyEvent {
 public:
  ScheduledEvent(std::shared_ptr<const ReadyEvent> computed, absl::Time at, Clock* clock)
      : computed_(std::move(computed)), at_(at), clock_(clock) {}
  absl::Time at() const { return at_; }
  bool Ready() const override { return clock_->Now() >= at_ && computed_->Ready(); }
  bool WaitFor(absl::Duration /*timeout*/) const override { return Ready(); }

 private:
  const std::shared_ptr<const ReadyEvent> computed_;
  const absl::Time at_;
  Clock* const clock_;
};

// Not thread-safe, as every ModelRunner.
class VirtualModelRunner final : public engine::ModelRunner {
 public:
  // `inner` and the clocks outlive this.
  VirtualModelRunner(engine::ModelRunner* inner, StepTime step_time, WorkerClock* clock,
                     Clock* shared)
      : inner_(inner), step_time_(std::move(step_time)), clock_(clock), shared_(shared) {}

  int max_in_flight() const override { return inner_->max_in_flight(); }
  absl::StatusOr<engine::LaunchedStep> Launch(const engine::Batch& batch) override;
  absl::StatusOr<engine::StepOutput> Collect(engine::StepId step) override;

 private:
  engine::ModelRunner* const inner_;
  const StepTime step_time_;
  WorkerClock* const clock_;
  Clock* const shared_;
  absl::Time device_free_ = absl::InfinitePast();
  std::deque<absl::Time> ends_;  // of the steps in flight, oldest first
};

}  // namespace tandem
