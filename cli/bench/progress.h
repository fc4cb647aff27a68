// How far a run is, on stderr: one line that is drawn again on a terminal, a line every ten seconds
// elsewhere.
#pragma once

#include <cstddef>
#include <string>

#include "absl/time/time.h"

#include "cli/bench/runner.h"

namespace tandem::cli {

// "[=====>              ]  25/100, 3 running, 0 failed, 512.0 tok/s, 1m15s left"
std::string DescribeProgress(const RunProgress& progress, size_t total);

// Used by one thread.
class ProgressPrinter {
 public:
  ProgressPrinter(std::string label, size_t total);

  void Show(const RunProgress& progress);
  // Takes the bar off a terminal, so that what follows stands alone.
  void Clear();

 private:
  const std::string label_;
  const size_t total_;
  const bool terminal_;
  absl::Duration next_line_;
};

}  // namespace tandem::cli
