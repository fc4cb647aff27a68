#include "simulation/timed_model_runner.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"

namespace tandem::engine {

TimedModelRunner::TimedModelRunner(int num_layers, int vocab_size, Clock* clock, StepTime step_time)
    : num_layers_(num_layers),
      vocab_size_(vocab_size),
      clock_(clock),
      step_time_(std::move(step_time)) {}

absl::StatusOr<LaunchedStep> TimedModelRunner::Launch(const Batch& batch) {
  TANDEM_CHECK(in_flight_.size() < 2, "two steps are in flight already");
  const absl::Time begins = std::max(clock_->Now(), last_end_);
  const absl::Duration takes = step_time_(batch);
  last_end_ = begins + takes;
  time_busy_ += takes;
  Step& step = in_flight_.emplace_back(Step{++last_launched_, last_end_, {}});
  for (const BatchItem& item : batch.items) {
    ItemOutput& output = step.output.items.emplace_back();
    if (item.sampling == nullptr) continue;
    output.has_token = true;
    output.token.token = item.length() % vocab_size_;
  }
  LaunchedStep launched{.id = step.id};
  for (int i = 0; batch.wants_layer_events && i < num_layers_; ++i) {
    const absl::Time ready = begins + takes * (i + 1) / num_layers_;
    launched.layer_ready.push_back(std::make_shared<TimedEvent>(clock_, begins, last_end_, ready));
  }
  return launched;
}

absl::StatusOr<StepOutput> TimedModelRunner::Collect(StepId id) {
  TANDEM_CHECK(!in_flight_.empty() && in_flight_.front().id == id,
               "step {} is not the oldest in flight", id);
  StepOutput output = std::move(in_flight_.front().output);
  in_flight_.pop_front();
  return output;
}

absl::Time TimedModelRunner::BusyUntil() const {
  return in_flight_.empty() ? absl::InfinitePast() : in_flight_.front().ends;
}

}  // namespace tandem::engine
