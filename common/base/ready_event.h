// A point in a device's work that threads of the host can wait for: what the engine gives to the
// sender of KV blocks, since neither may include the other.
//
// Thread-safe. An event comes true once and stays true. True means that the work before the event
// is over and its memory may be read: finished, or given up because its step failed. Whoever
// launched the step learns which of the two it was and aborts what depends on a failed one.
#pragma once

#include "absl/synchronization/notification.h"
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
  bool Ready() const override { return done_.HasBeenNotified(); }
  bool WaitFor(absl::Duration timeout) const override {
    return done_.WaitForNotificationWithTimeout(timeout);
  }
  // Once.
  void Set() { done_.Notify(); }

 private:
  absl::Notification done_;
};

}  // namespace tandem
