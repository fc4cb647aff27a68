// A bound on the log lines that a peer can cause.
#pragma once

#include <cstdint>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace tandem {

// Thread-safe. Lets a few lines through at once, then one per second.
class LogLimiter {
 public:
  // Whether the next line may be written.
  bool Allow() { return AllowAt(absl::Now()); }
  bool AllowAt(absl::Time now);
  // For the line that was just allowed: "" or " (and 12 lines like it)", those withheld before it.
  std::string Withheld();

 private:
  absl::Mutex mutex_;
  double allowance_ ABSL_GUARDED_BY(mutex_) = kBurst;
  absl::Time last_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  uint64_t withheld_ ABSL_GUARDED_BY(mutex_) = 0;

  static constexpr double kBurst = 10;
};

}  // namespace tandem
