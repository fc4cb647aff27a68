// A bound on the log lines that a peer can cause.
#pragma once

#include <cstdint>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace tandem {

// Thread-safe. Lets a few lines through at once, then one per second, unless told otherwise.
class LogLimiter {
 public:
  explicit LogLimiter(double burst = 10, double per_second = 1)
      : burst_(burst), per_second_(per_second), allowance_(burst) {}

  // Whether the next line may be written.
  bool Allow() { return AllowAt(absl::Now()); }
  bool AllowAt(absl::Time now);
  // For the line that was just allowed: how many were withheld before it, and the same in words, ""
  // or " (and 12 lines like it)". They count for the line that asks first.
  uint64_t TakeWithheld();
  std::string Withheld();

 private:
  const double burst_;
  const double per_second_;
  absl::Mutex mutex_;
  double allowance_ ABSL_GUARDED_BY(mutex_);
  absl::Time last_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  uint64_t withheld_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace tandem
