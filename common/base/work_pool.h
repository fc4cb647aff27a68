// A few threads for work that must not be done where it arrives: what a client can make large does
// not run in the reactions of RPCs, of which all clients share a few threads.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace tandem {

// Thread-safe.
class WorkPool {
 public:
  // At most `capacity` pieces of work wait.
  WorkPool(int threads, size_t capacity);
  // Does what was taken first.
  ~WorkPool();
  WorkPool(const WorkPool&) = delete;
  WorkPool& operator=(const WorkPool&) = delete;

  // Oldest first. False: too much waits, and `work` will not run.
  [[nodiscard]] bool TryRun(std::function<void()> work);

 private:
  void Run();
  bool Ready() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !work_.empty() || stopping_; }

  const size_t capacity_;
  absl::Mutex mutex_;
  std::deque<std::function<void()>> work_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace tandem
