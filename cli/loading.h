// How far the workers of a cluster are with loading their weights, all together. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "absl/time/time.h"

namespace tandem::cli {

// A worker's report on stdout: "loading DONE TOTAL", in bytes (--report-loading).
struct LoadingLine {
  uint64_t done = 0;
  uint64_t total = 0;
};
std::optional<LoadingLine> ParseLoadingLine(const std::string& line);

class Loading {
 public:
  void Report(const std::string& worker, const LoadingLine& line, absl::Time now);
  // It loads no more: it serves, or has ended.
  void Forget(const std::string& worker) { workers_.erase(worker); }

  // Of one worker, the largest; 0: none has reported yet.
  uint64_t worker_bytes() const { return worker_bytes_; }
  // Whether there is anything left to load.
  bool active() const;
  // "loading 2 workers [=====>    ]  51 %, 7.6 of 15.2 GB, 5.1 GB/s, 2s left", in at most `width`
  // columns.
  std::string Text(absl::Time now, int width) const;

 private:
  std::map<std::string, LoadingLine> workers_;
  uint64_t worker_bytes_ = 0;
  absl::Time began_ = absl::InfiniteFuture();
};

}  // namespace tandem::cli
