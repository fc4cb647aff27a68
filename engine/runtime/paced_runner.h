// Steps that take no less than a given time: a small model then behaves as a large one does, with
// the processor idle. For experiments with scheduling and overload.
#pragma once

#include <algorithm>
#include <deque>

#include "absl/time/clock.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "engine/runtime/model_runner.h"

namespace tandem::engine {

// Not thread-safe, as every ModelRunner.
class PacedRunner final : public ModelRunner {
 public:
  // `inner` outlives this.
  PacedRunner(ModelRunner* inner, absl::Duration least) : inner_(inner), least_(least) {}

  int max_in_flight() const override { return inner_->max_in_flight(); }
  absl::StatusOr<LaunchedStep> Launch(const Batch& batch) override {
    absl::StatusOr<LaunchedStep> step = inner_->Launch(batch);
    // A step begins when the one before it has ended.
    if (step.ok()) {
      last_end_ = std::max(last_end_, Clock::Real()->Now()) + least_;
      ends_.push_back(last_end_);
    }
    return step;
  }
  absl::StatusOr<StepOutput> Collect(StepId step) override {
    absl::StatusOr<StepOutput> output = inner_->Collect(step);
    absl::SleepFor(ends_.front() - Clock::Real()->Now());
    ends_.pop_front();
    return output;
  }
  const std::atomic<uint64_t>* progress() const override { return inner_->progress(); }

 private:
  ModelRunner* const inner_;
  const absl::Duration least_;
  absl::Time last_end_ = absl::InfinitePast();
  std::deque<absl::Time> ends_;  // of the steps in flight
};

}  // namespace tandem::engine
