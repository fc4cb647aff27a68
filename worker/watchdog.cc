#include "worker/watchdog.h"

#include <algorithm>
#include <utility>

namespace tandem::worker {

Watchdog::Watchdog(Options options, Clock* clock) : options_(std::move(options)), clock_(clock) {}

Watchdog::~Watchdog() { Stop(); }

void Watchdog::Start() {
  thread_ = std::thread([this] {
    while (!stop_.WaitForNotificationWithTimeout(options_.period)) Look();
  });
}

void Watchdog::Stop() {
  if (!stop_.HasBeenNotified()) stop_.Notify();
  if (thread_.joinable()) thread_.join();
}

void Watchdog::Look() {
  const absl::Time now = clock_->Now();
  const Seen seen = {
      turns_.load(std::memory_order_relaxed),
      options_.within_turn != nullptr ? options_.within_turn->load(std::memory_order_relaxed) : 0};
  const bool same_turn = seen_.has_value() && seen_->turns == seen.turns;
  if (!seen_.has_value() || *seen_ != seen) {
    without_progress_ = absl::ZeroDuration();
  } else {
    // A process that was stopped as a whole did not look either, and is not stuck.
    without_progress_ += std::min(now - looked_, 2 * options_.period);
  }
  seen_ = seen;
  looked_ = now;
  if (same_turn && options_.report) options_.report(without_progress_);
  if (without_progress_ >= options_.limit) options_.on_stuck(without_progress_);
}

}  // namespace tandem::worker
