// The streams that fronts hold open, from the request's arrival until the last byte of the answer
// is out: what a draining router waits for.
//
// Thread-safe; outlives its slots.
#pragma once

#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace tandem::router {

class OpenStreams {
 public:
  // One open stream. Movable; destroying it closes the stream.
  class Slot {
   public:
    Slot(Slot&& other) noexcept : streams_(std::exchange(other.streams_, nullptr)) {}
    Slot& operator=(Slot&&) = delete;
    ~Slot() {
      if (streams_ != nullptr) streams_->Close();
    }

   private:
    friend class OpenStreams;
    explicit Slot(OpenStreams* streams) : streams_(streams) {}
    OpenStreams* streams_;
  };

  // Never refused: a front takes a slot first and answers with a status then.
  Slot Open() {
    absl::MutexLock lock(&mutex_);
    ++open_;
    return Slot(this);
  }
  // New requests are to be refused from now on.
  void StopAccepting() {
    absl::MutexLock lock(&mutex_);
    accepting_ = false;
  }
  bool accepting() const {
    absl::MutexLock lock(&mutex_);
    return accepting_;
  }
  int open() const {
    absl::MutexLock lock(&mutex_);
    return open_;
  }
  // Waits until none is open; false after `timeout`.
  bool AwaitNone(absl::Duration timeout) {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(absl::Condition(this, &OpenStreams::None), timeout);
  }

 private:
  bool None() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return open_ == 0; }
  void Close() {
    absl::MutexLock lock(&mutex_);
    --open_;
  }

  mutable absl::Mutex mutex_;
  bool accepting_ ABSL_GUARDED_BY(mutex_) = true;
  int open_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace tandem::router
