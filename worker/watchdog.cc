#include "worker/watchdog.h"

#include <algorithm>
#include <utility>

namespace tandem::worker {

Watchdog::Watchdog(Options options, Clock* clock) : options_(std::move(options)), clock_(clock) {}

Watchdog::~Watchdog() { Stop(); }

void Watchdog::Start() {
  looks_ = std::thread([this] {
    while (!stop_.WaitForNotificationWithTimeout(options_.period)) {
      const std::optional<absl::Duration> news = Look();
      to_tell_ = news.has_value() ? absl::ToInt64Nanoseconds(*news) : kNothing;
      to_tell_.notify_one();
    }
    to_tell_ = kNoMore;
    to_tell_.notify_one();
  });
  if (!options_.report) return;
  tells_ = std::thread([this] {
    for (;;) {
      to_tell_.wait(kNothing);
      const int64_t news = to_tell_.exchange(kNothing);
      if (news == kNoMore) return;
      if (news != kNothing) options_.report(absl::Nanoseconds(news));
    }
  });
}

void Watchdog::Stop() {
  if (!stop_.HasBeenNotified()) stop_.Notify();
  for (std::thread* thread : {&looks_, &tells_}) {
    if (thread->joinable()) thread->join();
  }
}

std::optional<absl::Duration> Watchdog::Look() {
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
  if (without_progress_ >= options_.limit) options_.on_stuck(without_progress_);
  if (!same_turn) return std::nullopt;
  return without_progress_;
}

}  // namespace tandem::worker
