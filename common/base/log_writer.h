// Writes lines to a file descriptor from a thread of its own, so that nobody who logs waits for
// whoever reads: a terminal that stands still, a pipe that is full.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace tandem {

// Thread-safe.
class LogWriter {
 public:
  // Lines that do not fit into `max_bytes` of waiting ones are lost; the line that `note_lost`
  // makes of their number stands where they are missing.
  LogWriter(int fd, size_t max_bytes, std::function<std::string(uint64_t lost)> note_lost);
  // Writes what waits, however long that takes.
  ~LogWriter();
  LogWriter(const LogWriter&) = delete;
  LogWriter& operator=(const LogWriter&) = delete;

  // A line with its newline. Never waits for the descriptor.
  void Write(std::string_view line);
  // Waits until all that came before is written; false: it was not within `bound`.
  bool Drain(absl::Duration bound);

 private:
  void Run();
  // What was taken before is written; waits for more. False: there is none, and never will be.
  bool Next(std::string* text, uint64_t* lost);
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !waiting_.empty() || lost_ > 0 || stopping_;
  }
  bool Drained() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return waiting_.empty() && lost_ == 0 && !writing_;
  }

  const int fd_;
  const size_t max_bytes_;
  const std::function<std::string(uint64_t)> note_lost_;
  absl::Mutex mutex_;
  std::string waiting_ ABSL_GUARDED_BY(mutex_);
  uint64_t lost_ ABSL_GUARDED_BY(mutex_) = 0;  // behind what waits
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace tandem
