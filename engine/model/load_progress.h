// Says how far the loading of a model is: a bar where stderr is a terminal, else a line of log
// every few seconds, and one at the end. Silent for models that are loaded in a moment. To who
// started this process also line by line on stdout, "loading DONE TOTAL" in bytes, if it asked for
// that.
#pragma once

#include <cstddef>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace tandem::engine {

// "[=====>    ]  51 %, 7.6 of 15.2 GB, 5.1 GB/s, 1.5 s left": `width` characters within the
// brackets. Pure.
std::string ProgressText(size_t done, size_t total, absl::Duration elapsed, int width);

// Thread-safe.
class LoadProgress {
 public:
  // `what` begins every line: "loading models/7b". `report`: on stdout too.
  LoadProgress(std::string what, size_t total_bytes, bool report = false);
  ~LoadProgress();

  void Add(size_t bytes);
  // Everything is loaded.
  void Finish();

 private:
  void EndBar() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Report(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string what_;
  const size_t total_;
  const bool report_;
  const bool terminal_;
  const absl::Time begin_;
  absl::Mutex mutex_;
  size_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  bool bar_shown_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Time next_ ABSL_GUARDED_BY(mutex_);
  absl::Time next_report_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

}  // namespace tandem::engine
