// What happens when, under a virtual clock: the clock jumps from one event to the next, so a quiet
// minute costs nothing and every run with the same inputs is the same run.
//
// Not thread-safe: everything of a simulation happens on one thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "absl/time/time.h"

#include "simulation/fake_clock.h"

namespace tandem {

class EventQueue {
 public:
  FakeClock& clock() { return clock_; }
  absl::Time Now() { return clock_.Now(); }

  // At `when`, or now if that is past. Events of one time happen in the order of these calls.
  void At(absl::Time when, std::function<void()> act) {
    events_.emplace(std::make_pair(std::max(when, Now()), ++last_), std::move(act));
  }
  void After(absl::Duration delay, std::function<void()> act) { At(Now() + delay, std::move(act)); }

  // When the next event comes; InfiniteFuture where there is none.
  absl::Time NextAt() const {
    return events_.empty() ? absl::InfiniteFuture() : events_.begin()->first.first;
  }
  // The next event, if it comes by `until`. False: there is none, and it is `until` now.
  bool RunNext(absl::Time until) {
    const auto it = events_.begin();
    const bool due = it != events_.end() && it->first.first <= until;
    const absl::Time to = due ? it->first.first : until;
    // What a jump of the clock has passed over happens late.
    if (to > Now() && to < absl::InfiniteFuture()) clock_.Advance(to - Now());
    if (!due) return false;
    const std::function<void()> act = std::move(it->second);
    events_.erase(it);
    act();
    return true;
  }
  void RunUntil(absl::Time until) {
    while (RunNext(until)) {
    }
  }
  // What was to come does not.
  void Clear() { events_.clear(); }
  uint64_t num_events() const { return last_; }

 private:
  FakeClock clock_;
  uint64_t last_ = 0;
  std::map<std::pair<absl::Time, uint64_t>, std::function<void()>> events_;
};

}  // namespace tandem
