// Watches from beside a loop whether it gets anywhere. A kernel that never ends, a lock that nobody
// gives back: the process lives, answers pings and does nothing, and of all its threads the one
// that would have to say so cannot.
//
// While the loop is busy with one turn for longer, the watchdog tells the cluster how long there
// has been no progress, so that the router sends the work elsewhere; and when that passes a limit
// it ends the process, so that its supervisor starts a new one.
//
// The loop may hang while it holds a lock that telling the cluster needs. So one thread tells, and
// another one, which waits for no lock, looks and ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

#include "common/base/clock.h"

namespace tandem::worker {

class Watchdog {
 public:
  struct Options {
    absl::Duration period = absl::Milliseconds(500);
    absl::Duration limit = absl::InfiniteDuration();  // without progress
    // Grows whenever something of a turn is done. Any thread; may be empty.
    const std::atomic<uint64_t>* within_turn = nullptr;
    std::function<void(absl::Duration without_progress)> report;  // may be empty, and may wait
    // Waits for no lock that the loop might have.
    std::function<void(absl::Duration without_progress)> on_stuck;
  };

  // `clock` outlives this.
  Watchdog(Options options, Clock* clock);
  ~Watchdog();

  // The loop has done another turn. Any thread.
  void NoteTurn() { turns_.fetch_add(1, std::memory_order_relaxed); }
  // Looks every `period`, and tells what it saw, on threads of its own until Stop (idempotent),
  // which waits for a report that is under way.
  void Start();
  void Stop();
  // Looks once; in tests instead of Start. Returns what there is to tell.
  std::optional<absl::Duration> Look();

 private:
  struct Seen {
    uint64_t turns = 0;
    uint64_t within_turn = 0;
    bool operator==(const Seen&) const = default;
  };

  const Options options_;
  Clock* const clock_;
  std::atomic<uint64_t> turns_ = 0;
  // Only who looks.
  std::optional<Seen> seen_;
  absl::Time looked_;
  absl::Duration without_progress_;
  absl::Notification stop_;
  // What the last look left to tell, in nanoseconds. The one thread waits for the other to change
  // it.
  static constexpr int64_t kNothing = -1, kNoMore = -2;
  std::atomic<int64_t> to_tell_ = kNothing;
  std::thread looks_, tells_;
};

}  // namespace tandem::worker
