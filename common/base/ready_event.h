// A point in a device's work that threads of the host can wait for: what the engine gives to the
// sender of KV blocks, since neither may include the other.
//
// Thread-safe. An event comes true once and stays true. True means that the work before the event
// is over and its memory may be read: finished, or given up because its step failed. Whoever
// launched the step learns which of the two it was and aborts what depends on a failed one.
#pragma once

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace tandem {

class ReadyEvent {
 public:
  virtual ~ReadyEvent() = default;

  // Never blocks.
  virtual bool Ready() const = 0;
  // Blocks until the event is true, at most for `timeout`; returns Ready(). The thread that
  // computes on a CPU must not wait for its own work.
  virtual bool WaitFor(absl::Duration timeout) const = 0;
};

// An event that a thread of the host makes true.
class HostEvent final : public ReadyEvent {
 public:
  bool Ready() const override {
    absl::MutexLock lock(&mutex_);
    return done_;
  }
  bool WaitFor(absl::Duration timeout) const override {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(&done_), timeout);
  }
  // Idempotent.
  void Set() {
    absl::MutexLock lock(&mutex_);
    done_ = true;
  }

 private:
  // Not a Notification: the thread sanitizer is told of mutexes only (docs/testing.md).
  mutable absl::Mutex mutex_;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem
