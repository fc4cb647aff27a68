#include "engine/runtime/rank_threads.h"

namespace tandem::engine {

RankThreads::RankThreads(int size) {
  for (int rank = 1; rank < size; ++rank) threads_.emplace_back([this, rank] { Serve(rank); });
}

RankThreads::~RankThreads() {
  {
    absl::MutexLock lock(&mutex_);
    closing_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

void RankThreads::Run(absl::FunctionRef<void(int rank)> work) {
  {
    absl::MutexLock lock(&mutex_);
    work_ = &work;
    running_ = static_cast<int>(threads_.size());
    ++round_;
  }
  work(0);
  absl::MutexLock lock(&mutex_);
  const auto over = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return running_ == 0; };
  mutex_.Await(absl::Condition(&over));
  work_ = nullptr;
}

void RankThreads::Serve(int rank) {
  uint64_t served = 0;
  while (true) {
    const absl::FunctionRef<void(int)>* work = nullptr;
    {
      absl::MutexLock lock(&mutex_);
      const auto due = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return closing_ || round_ != served;
      };
      mutex_.Await(absl::Condition(&due));
      if (closing_) return;
      served = round_;
      work = work_;
    }
    (*work)(rank);
    absl::MutexLock lock(&mutex_);
    --running_;
  }
}

}  // namespace tandem::engine
