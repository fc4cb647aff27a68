#include "simulation/virtual_model_runner.h"

#include <algorithm>
#include <utility>

namespace tandem {

absl::StatusOr<engine::LaunchedStep> VirtualModelRunner::Launch(const engine::Batch& batch) {
  absl::StatusOr<engine::LaunchedStep> launched = inner_->Launch(batch);
  if (!launched.ok()) return launched;
  const absl::Time begin = std::max(device_free_, clock_->Now());
  const absl::Duration takes = step_time_(batch);
  device_free_ = begin + takes;
  ends_.push_back(device_free_);
  const auto layers = static_cast<int>(launched->layer_ready.size());
  for (int layer = 0; layer < layers; ++layer) {
    auto& event = launched->layer_ready[static_cast<size_t>(layer)];
    event = std::make_shared<ScheduledEvent>(std::move(event), begin + takes * (layer + 1) / layers,
                                             shared_);
  }
  return launched;
}

absl::StatusOr<engine::StepOutput> VirtualModelRunner::Collect(engine::StepId step) {
  clock_->WaitUntil(ends_.front());
  ends_.pop_front();
  return inner_->Collect(step);
}

}  // namespace tandem
