// "reading the prompt: 4,096 of 32,000 tokens" on a terminal, in the place of the answer that is to
// come there.
#pragma once

#include <cstdio>
#include <string>

#include "absl/time/time.h"

#include "common/base/clock.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::cli {

// Not thread-safe.
class ReadingLine {
 public:
  struct Options {
    std::FILE* out = stderr;
    bool terminal = false;  // else nothing is shown
    bool colour = false;
    int width = 80;           // columns; a line that has no room is not shown
    std::string line_so_far;  // that the answer stands behind
  };
  // As `out` is.
  static Options Of(std::FILE* out, std::string line_so_far);

  // The request goes out now.
  ReadingLine(Options options, Clock* clock);
  ~ReadingLine() { Clear(); }
  ReadingLine(const ReadingLine&) = delete;
  ReadingLine& operator=(const ReadingLine&) = delete;

  // Whether there is a terminal: else nobody need ask for progress.
  bool wanted() const { return options_.terminal; }
  // Not at once: most prompts are read before anybody wonders.
  void Show(const v1::PromptProgress& progress);
  // Leaves the line as it was. Idempotent.
  void Clear();

 private:
  const Options options_;
  Clock* const clock_;
  const absl::Time shown_from_;
  bool shown_ = false;
};

}  // namespace tandem::cli
