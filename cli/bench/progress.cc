#include "cli/bench/progress.h"

#include <algorithm>
#include <cstdio>
#include <unistd.h>
#include <utility>

#include "fmt/format.h"

namespace tandem::cli {
namespace {

constexpr absl::Duration kLineEvery = absl::Seconds(10);
constexpr size_t kBarWidth = 20;

std::string Bar(size_t done, size_t total) {
  const size_t filled = total == 0 ? kBarWidth : done * kBarWidth / total;
  std::string bar(filled, '=');
  if (filled < kBarWidth) bar += '>';
  bar.resize(kBarWidth, ' ');
  return bar;
}

std::string Remaining(const RunProgress& progress, size_t total) {
  if (progress.ended == 0) return "";
  const absl::Duration left = progress.elapsed / static_cast<int64_t>(progress.ended) *
                              static_cast<int64_t>(total - progress.ended);
  return ", " + absl::FormatDuration(absl::Trunc(left, absl::Seconds(1))) + " left";
}

}  // namespace

std::string DescribeProgress(const RunProgress& progress, size_t total) {
  const double seconds = absl::ToDoubleSeconds(progress.elapsed);
  const double rate = seconds > 0 ? static_cast<double>(progress.output_tokens) / seconds : 0;
  return fmt::format("[{}] {}/{}, {} running, {} failed, {:.1f} tok/s{}",
                     Bar(progress.ended, total), progress.ended, total, progress.running,
                     progress.failed, rate, Remaining(progress, total));
}

ProgressPrinter::ProgressPrinter(std::string label, size_t total)
    : label_(std::move(label)),
      total_(total),
      terminal_(isatty(STDERR_FILENO) == 1),
      next_line_(kLineEvery) {}

void ProgressPrinter::Show(const RunProgress& progress) {
  if (!terminal_ && progress.elapsed < next_line_) return;
  const std::string text = label_ + " " + DescribeProgress(progress, total_);
  if (terminal_) {
    fmt::print(stderr, "\r\x1b[K{}", text);
  } else {
    fmt::print(stderr, "{}\n", text);
    next_line_ = progress.elapsed + kLineEvery;
  }
  std::fflush(stderr);
}

void ProgressPrinter::Clear() {
  if (terminal_) fmt::print(stderr, "\r\x1b[K");
}

}  // namespace tandem::cli
