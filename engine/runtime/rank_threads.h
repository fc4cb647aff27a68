// A thread for each rank of a model, since ranks wait for each other.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"

namespace tandem::engine {

class RankThreads {
 public:
  explicit RankThreads(int size);
  ~RankThreads();

  // Calls `work` for each rank, all at once, rank 0 on the caller's thread; returns when all have
  // returned. One caller at a time.
  void Run(absl::FunctionRef<void(int rank)> work);

 private:
  void Serve(int rank);

  absl::Mutex mutex_;
  const absl::FunctionRef<void(int)>* work_ ABSL_GUARDED_BY(mutex_) = nullptr;
  uint64_t round_ ABSL_GUARDED_BY(mutex_) = 0;  // of the work
  int running_ ABSL_GUARDED_BY(mutex_) = 0;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;  // of the ranks from 1 on
};

}  // namespace tandem::engine
