#include "engine/model/load_progress.h"

#include <algorithm>
#include <cstdio>
#include <unistd.h>
#include <utility>

#include "fmt/format.h"
#include "spdlog/spdlog.h"

#include "common/base/clock.h"

namespace tandem::engine {
namespace {

constexpr absl::Duration kLinePeriod = absl::Seconds(5);
constexpr absl::Duration kBarPeriod = absl::Milliseconds(100);
constexpr absl::Duration kReportPeriod = absl::Milliseconds(200);
// What takes less is not worth a line.
constexpr absl::Duration kWorthSaying = absl::Milliseconds(500);
constexpr int kBarWidth = 30;

double Gigabytes(size_t bytes) { return static_cast<double>(bytes) / 1e9; }

}  // namespace

std::string ProgressText(size_t done, size_t total, absl::Duration elapsed, int width) {
  const double share =
      total == 0 ? 1 : std::min(1.0, static_cast<double>(done) / static_cast<double>(total));
  const double seconds = std::max(absl::ToDoubleSeconds(elapsed), 1e-3);
  const double rate = Gigabytes(done) / seconds;
  std::string bar(static_cast<size_t>(width), ' ');
  const auto filled = static_cast<size_t>(share * width);
  std::fill_n(bar.begin(), filled, '=');
  if (filled < bar.size()) bar[filled] = '>';
  std::string text = fmt::format("[{}] {:3.0f} %, {:.1f} of {:.1f} GB, {:.1f} GB/s", bar,
                                 100 * share, Gigabytes(done), Gigabytes(total), rate);
  if (done > 0 && done < total) {
    text += fmt::format(", {:.1f} s left", seconds * (1 - share) / share);
  }
  return text;
}

LoadProgress::LoadProgress(std::string what, size_t total_bytes, bool report)
    : what_(std::move(what)),
      total_(total_bytes),
      report_(report),
      terminal_(isatty(STDERR_FILENO) == 1),
      begin_(Clock::Real()->Now()),
      next_(begin_ + (terminal_ ? kWorthSaying : kLinePeriod)) {
  absl::MutexLock lock(&mutex_);
  Report(begin_);
}

LoadProgress::~LoadProgress() {
  absl::MutexLock lock(&mutex_);
  EndBar();
}

void LoadProgress::EndBar() {
  if (std::exchange(bar_shown_, false)) std::fputs("\r\033[K", stderr);
}

void LoadProgress::Report(absl::Time now) {
  if (!report_ || now < next_report_) return;
  next_report_ = now + kReportPeriod;
  fmt::print("loading {} {}\n", done_, total_);
  std::fflush(stdout);
}

void LoadProgress::Add(size_t bytes) {
  const absl::Time now = Clock::Real()->Now();
  absl::MutexLock lock(&mutex_);
  done_ += bytes;
  Report(now);
  if (now < next_) return;
  next_ = now + (terminal_ ? kBarPeriod : kLinePeriod);
  const std::string text = ProgressText(done_, total_, now - begin_, kBarWidth);
  if (terminal_) {
    fmt::print(stderr, "\r{}: {}\033[K", what_, text);
    std::fflush(stderr);
    bar_shown_ = true;
  } else {
    spdlog::info("{}: {}", what_, text.substr(text.find(']') + 2));
  }
}

void LoadProgress::Finish() {
  const absl::Duration elapsed = Clock::Real()->Now() - begin_;
  absl::MutexLock lock(&mutex_);
  EndBar();
  Report(absl::InfiniteFuture());
  if (elapsed < kWorthSaying) return;
  spdlog::info("{}: {:.1f} GB in {:.1f} s, {:.1f} GB/s", what_, Gigabytes(done_),
               absl::ToDoubleSeconds(elapsed),
               Gigabytes(done_) / std::max(absl::ToDoubleSeconds(elapsed), 1e-3));
}

}  // namespace tandem::engine
