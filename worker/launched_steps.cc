#include "worker/launched_steps.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"

namespace tandem::worker {
namespace {

constexpr int kHostTimeWindow = 16;  // steps

}  // namespace

int CollectedStep::NumTokens() const {
  int total = 0;
  for (const LaunchedRun& run : runs) total += run.num_tokens;
  return total;
}

LaunchedSteps::LaunchedSteps(engine::ModelRunner* runner, engine::BlockPool* pool, Clock* clock)
    : runner_(runner), pool_(pool), clock_(clock) {
  // A batch item can name one token that the host does not know (BatchItem::pending), not two.
  TANDEM_CHECK(runner_->max_in_flight() == 1 || runner_->max_in_flight() == 2,
               "the loops keep one or two steps in flight, the runner wants {}",
               runner_->max_in_flight());
}

LaunchedSteps::~LaunchedSteps() {
  // The device must be done with the pool before its memory goes.
  while (!empty()) Collect();
}

absl::StatusOr<engine::LaunchedStep> LaunchedSteps::Launch(const engine::Batch& batch,
                                                           std::vector<LaunchedRun> runs) {
  TANDEM_CHECK(!full(), "{} steps are in flight already", steps_.size());
  TANDEM_CHECK(runs.size() == batch.items.size(), "{} runs for {} items", runs.size(),
               batch.items.size());
  const absl::Time now = clock_->Now();
  absl::StatusOr<engine::LaunchedStep> launched = runner_->Launch(batch);
  if (!launched.ok()) return launched;
  // With nothing in flight the loop may have had nothing to do meanwhile.
  if (!std::exchange(launched_since_, true) && !empty()) {
    const absl::Duration took = clock_->Now() - last_collected_;
    host_time_ += (took - host_time_) / (host_time_ == absl::ZeroDuration() ? 1 : kHostTimeWindow);
  }
  steps_.push_back(Step{.id = launched->id, .runs = std::move(runs), .launched = now});
  return launched;
}

bool LaunchedSteps::drafted() const {
  return std::any_of(steps_.begin(), steps_.end(), [](const Step& step) {
    return std::any_of(step.runs.begin(), step.runs.end(),
                       [](const LaunchedRun& run) { return run.drafted > 0; });
  });
}

CollectedStep LaunchedSteps::Collect() {
  TANDEM_CHECK(!empty(), "nothing was launched");
  CollectedStep collected;
  collected.output = runner_->Collect(steps_.front().id);
  Step step = std::move(steps_.front());
  steps_.pop_front();
  collected.runs = std::move(step.runs);
  if (collected.output.ok()) {
    TANDEM_CHECK(collected.output->items.size() == collected.runs.size(), "{} outputs for {} items",
                 collected.output->items.size(), collected.runs.size());
  }
  const absl::Time now = clock_->Now();
  collected.took = now - std::max(step.launched, last_collected_);
  last_collected_ = now;
  launched_since_ = false;
  for (const uint64_t ticket : step.tickets) pool_->ReleaseQuarantine(ticket);
  num_returning_blocks_ -= step.quarantined;
  return collected;
}

bool LaunchedSteps::Contains(uint64_t sequence) const {
  return std::any_of(steps_.begin(), steps_.end(), [sequence](const Step& step) {
    return std::any_of(step.runs.begin(), step.runs.end(),
                       [sequence](const LaunchedRun& run) { return run.sequence == sequence; });
  });
}

void LaunchedSteps::Drop(uint64_t sequence, engine::BlockLease lease) {
  Step* newest = nullptr;
  for (Step& step : steps_) {
    for (LaunchedRun& run : step.runs) {
      if (run.sequence != sequence) continue;
      run.sequence = 0;
      newest = &step;
    }
  }
  if (newest == nullptr) return;  // ~BlockLease gives the blocks back
  const int before = pool_->counts().quarantined;
  newest->tickets.push_back(pool_->Quarantine(std::move(lease)));
  const int quarantined = pool_->counts().quarantined - before;
  newest->quarantined += quarantined;
  num_returning_blocks_ += quarantined;
}

}  // namespace tandem::worker
