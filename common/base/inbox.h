// A bounded queue from many threads to one owner thread: how RPC reactions and transports reach a
// worker loop.
#pragma once

#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace tandem {

// Thread-safe. `T` is moved in and out.
//
// Two ways in: `TryPush` for what may be refused (new work: refusing is back-pressure), `Push` for
// what must not be lost (cancellations, completions: their number is bounded by work already
// accepted).
template <typename T>
class Inbox {
 public:
  explicit Inbox(size_t capacity) : capacity_(capacity) {}

  // False when full or closed; `item` is untouched then.
  bool TryPush(T&& item) {
    absl::MutexLock lock(&mutex_);
    if (closed_ || items_.size() >= capacity_) return false;
    items_.push_back(std::move(item));
    return true;
  }

  // Beyond capacity too; dropped only after Close().
  void Push(T item) {
    absl::MutexLock lock(&mutex_);
    if (!closed_) items_.push_back(std::move(item));
  }

  // All items there are, oldest first; waits up to `timeout` for the first one or for Wake().
  std::vector<T> Drain(absl::Duration timeout) {
    absl::MutexLock lock(&mutex_);
    if (timeout > absl::ZeroDuration()) {
      mutex_.AwaitWithTimeout(absl::Condition(this, &Inbox::Ready), timeout);
    }
    woken_ = false;
    std::vector<T> out(std::make_move_iterator(items_.begin()),
                       std::make_move_iterator(items_.end()));
    items_.clear();
    return out;
  }

  // Ends a waiting Drain.
  void Wake() {
    absl::MutexLock lock(&mutex_);
    woken_ = true;
  }

  // Refuses further items and wakes the owner; what is queued can still be drained.
  void Close() {
    absl::MutexLock lock(&mutex_);
    closed_ = true;
  }

  bool closed() const {
    absl::MutexLock lock(&mutex_);
    return closed_;
  }

 private:
  bool Ready() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !items_.empty() || woken_ || closed_;
  }

  const size_t capacity_;
  mutable absl::Mutex mutex_;
  std::deque<T> items_ ABSL_GUARDED_BY(mutex_);
  bool woken_ ABSL_GUARDED_BY(mutex_) = false;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem
