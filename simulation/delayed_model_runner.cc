#include "simulation/delayed_model_runner.h"

#include <utility>

#include "absl/time/clock.h"

#include "common/base/check.h"

namespace tandem::engine {

DelayedModelRunner::DelayedModelRunner(ModelRunner* inner, std::function<absl::Duration()> delay)
    : inner_(inner),
      max_in_flight_(inner->max_in_flight()),
      delay_(std::move(delay)),
      thread_([this] { ComputeSteps(); }) {}

DelayedModelRunner::~DelayedModelRunner() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

absl::StatusOr<LaunchedStep> DelayedModelRunner::Launch(const Batch& batch) {
  absl::MutexLock lock(&mutex_);
  TANDEM_CHECK(in_flight_.size() < static_cast<size_t>(max_in_flight_),
               "{} steps are in flight already", in_flight_.size());
  absl::StatusOr<LaunchedStep> launched = inner_->Launch(batch);
  if (launched.ok()) in_flight_.push_back({launched->id, std::nullopt});
  return launched;
}

absl::StatusOr<StepOutput> DelayedModelRunner::Collect(StepId id) {
  absl::MutexLock lock(&mutex_);
  TANDEM_CHECK(!in_flight_.empty() && in_flight_.front().id == id,
               "step {} is not the oldest in flight", id);
  const auto computed = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return in_flight_.front().output.has_value();
  };
  mutex_.Await(absl::Condition(&computed));
  absl::StatusOr<StepOutput> output = *std::move(in_flight_.front().output);
  in_flight_.pop_front();
  return output;
}

DelayedModelRunner::Step* DelayedModelRunner::NextToCompute() {
  for (Step& step : in_flight_) {
    if (!step.output.has_value()) return &step;
  }
  return nullptr;
}

void DelayedModelRunner::ComputeSteps() {
  const auto wanted = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || NextToCompute() != nullptr;
  };
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      mutex_.Await(absl::Condition(&wanted));
      if (stopping_) return;
    }
    absl::SleepFor(delay_());
    absl::MutexLock lock(&mutex_);
    if (stopping_) return;
    Step* step = NextToCompute();
    step->output = inner_->Collect(step->id);
  }
}

}  // namespace tandem::engine
