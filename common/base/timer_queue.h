// Calls functions at times of a Clock, so that a test that owns the clock owns the timers too.
//
// Thread-safe and passive: it has no thread. Whoever drives it calls FireDue() and sleeps until
// Next(); `on_earlier` tells that sleeper that Next() has moved forward.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/clock.h"

namespace tandem {

class TimerQueue {
 public:
  // Names a timer; 0 names none.
  using Id = uint64_t;

  // `clock` outlives this. `on_earlier` may be empty; it is called without the lock held.
  TimerQueue(Clock* clock, std::function<void()> on_earlier)
      : clock_(clock), on_earlier_(std::move(on_earlier)) {}

  // `fire` is called once, from FireDue, at or after `when`. It may set and cancel timers.
  Id Set(absl::Time when, std::function<void()> fire);
  // The timer will not begin to fire from now on; it may be firing on another thread. Does nothing
  // for 0 and for a timer that has fired.
  void Cancel(Id id);

  // When the first timer is due; InfiniteFuture without any.
  absl::Time Next() const;
  // Fires what is due, in the order of time. Returns how many.
  size_t FireDue();

 private:
  using Key = std::pair<absl::Time, Id>;

  Clock* const clock_;
  const std::function<void()> on_earlier_;
  mutable absl::Mutex mutex_;
  Id last_id_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<Key, std::function<void()>> timers_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<Id, absl::Time> times_ ABSL_GUARDED_BY(mutex_);  // of the timers in timers_
};

}  // namespace tandem
