// A model runner whose steps end later, on a thread of their own, as a GPU's do: what the loops may
// not touch before a step is collected is really touched until then.
#pragma once

#include <deque>
#include <functional>
#include <optional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "engine/runtime/model_runner.h"

namespace tandem::engine {

// Not thread-safe, as every ModelRunner. Steps are computed by another runner, in order, each after
// a delay.
class DelayedModelRunner final : public ModelRunner {
 public:
  // `inner` outlives this and is used by nobody else. Its max_in_flight is this one's. `delay` is
  // called on the computing thread before each step.
  DelayedModelRunner(ModelRunner* inner, std::function<absl::Duration()> delay);
  ~DelayedModelRunner() override;

  int max_in_flight() const override { return max_in_flight_; }
  absl::StatusOr<LaunchedStep> Launch(const Batch& batch) override;
  absl::StatusOr<StepOutput> Collect(StepId id) override;

 private:
  struct Step {
    StepId id;
    std::optional<absl::StatusOr<StepOutput>> output;  // once computed
  };

  void ComputeSteps();
  Step* NextToCompute() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  ModelRunner* const inner_;  // used under mutex_
  const int max_in_flight_;
  const std::function<absl::Duration()> delay_;
  absl::Mutex mutex_;
  std::deque<Step> in_flight_ ABSL_GUARDED_BY(mutex_);  // oldest first
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace tandem::engine
