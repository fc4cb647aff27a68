// A model runner that computes nothing and says how long that takes: for clusters of which only the
// times are of interest.
#pragma once

#include <deque>
#include <memory>

#include "absl/time/time.h"

#include "common/base/clock.h"
#include "engine/runtime/model_runner.h"
#include "simulation/step_time.h"

namespace tandem::engine {

// Not thread-safe, as every ModelRunner. A step begins when it is launched and the one before it is
// over, and takes `step_time` of its batch by `clock`. Nobody sleeps: whoever drives the loop steps
// it again only at BusyUntil(). So the loop launches step n + 1 in the turn that collects step n,
// and its inputs are what a device has whose host works one step ahead.
//
// Tokens are arbitrary and the KV in the pool is not written.
class TimedModelRunner final : public ModelRunner {
 public:
  // `clock` outlives this.
  TimedModelRunner(int num_layers, int vocab_size, Clock* clock, StepTime step_time);

  int max_in_flight() const override { return 2; }
  absl::StatusOr<LaunchedStep> Launch(const Batch& batch) override;
  absl::StatusOr<StepOutput> Collect(StepId id) override;

  // When the oldest step in flight is over; InfinitePast where there is none.
  absl::Time BusyUntil() const;
  // All steps together.
  absl::Duration TimeBusy() const { return time_busy_; }

 private:
  struct Step {
    StepId id = 0;
    absl::Time ends;
    StepOutput output;
  };

  const int num_layers_;
  const int vocab_size_;
  Clock* const clock_;
  const StepTime step_time_;
  std::deque<Step> in_flight_;  // oldest first
  StepId last_launched_ = 0;
  absl::Time last_end_ = absl::InfinitePast();
  absl::Duration time_busy_;
};

// True from a time on.
class TimedEvent final : public ReadyEvent {
 public:
  // A layer of a step that runs from `begins` to `ends`. `clock` outlives this.
  TimedEvent(Clock* clock, absl::Time begins, absl::Time ends, absl::Time ready)
      : begins(begins), ends(ends), clock_(clock), ready_(ready) {}

  bool Ready() const override { return clock_->Now() >= ready_; }
  bool WaitFor(absl::Duration) const override { return Ready(); }

  const absl::Time begins, ends;

 private:
  Clock* const clock_;
  const absl::Time ready_;
};

}  // namespace tandem::engine
