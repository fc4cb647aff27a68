#include "cli/loading.h"

#include <algorithm>
#include <sstream>

#include "fmt/format.h"

#include "cli/units.h"

namespace tandem::cli {
namespace {

constexpr int kLongestBar = 40;
constexpr int kShortestBar = 10;

std::string Bar(double share, int width) {
  std::string bar(static_cast<size_t>(width), ' ');
  const auto filled = static_cast<size_t>(share * width);
  std::fill_n(bar.begin(), std::min(filled, bar.size()), '=');
  if (filled < bar.size()) bar[filled] = '>';
  return "[" + bar + "]";
}

}  // namespace

std::optional<LoadingLine> ParseLoadingLine(const std::string& line) {
  std::istringstream words(line);
  std::string loading, more;
  LoadingLine out;
  words >> loading >> out.done >> out.total;
  if (loading != "loading" || words.fail() || words >> more) return std::nullopt;
  return out;
}

void Loading::Report(const std::string& worker, const LoadingLine& line, absl::Time now) {
  began_ = std::min(began_, now);
  worker_bytes_ = std::max(worker_bytes_, line.total);
  workers_[worker] = line;
}

bool Loading::active() const {
  return std::any_of(workers_.begin(), workers_.end(),
                     [](const auto& entry) { return entry.second.done < entry.second.total; });
}

std::string Loading::Text(absl::Time now, int width) const {
  uint64_t done = 0, total = 0;
  for (const auto& [name, line] : workers_) {
    done += std::min(line.done, line.total);
    total += line.total;
  }
  const double share = total == 0 ? 1 : static_cast<double>(done) / static_cast<double>(total);
  const double seconds = std::max(absl::ToDoubleSeconds(now - began_), 1e-3);
  const std::string head =
      fmt::format("loading {} worker{} ", workers_.size(), workers_.size() == 1 ? "" : "s");
  std::string figures = fmt::format(
      " {:3.0f} %, {:.1f} of {:.1f} GB, {:.1f} GB/s", 100 * share, static_cast<double>(done) / 1e9,
      static_cast<double>(total) / 1e9, static_cast<double>(done) / 1e9 / seconds);
  if (done > 0 && done < total) {
    figures += fmt::format(", {} left", TimeText(absl::Seconds(seconds * (1 - share) / share)));
  }
  // A terminal that is filled to its last column begins a new line.
  const int bar = width - 1 - static_cast<int>(head.size() + figures.size()) - 2;
  const std::string text =
      bar < kShortestBar ? head + figures : head + Bar(share, std::min(bar, kLongestBar)) + figures;
  return text.substr(0, static_cast<size_t>(std::max(width - 1, 0)));
}

}  // namespace tandem::cli
