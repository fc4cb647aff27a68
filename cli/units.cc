#include "cli/units.h"

#include <algorithm>
#include <cmath>

#include "fmt/format.h"

namespace tandem::cli {

std::string CountText(uint64_t count) {
  std::string out = std::to_string(count);
  for (int64_t i = static_cast<int64_t>(out.size()) - 3; i > 0; i -= 3) {
    out.insert(static_cast<size_t>(i), ",");
  }
  return out;
}

std::string TimeText(absl::Duration time) {
  if (time < absl::Seconds(9.95)) {
    return fmt::format("{:.1f}s", std::max(0.0, absl::ToDoubleSeconds(time)));
  }
  const int64_t seconds = std::llround(absl::ToDoubleSeconds(std::min(time, absl::Hours(1e6))));
  const int64_t minutes = seconds / 60;
  const int64_t hours = minutes / 60;
  if (minutes == 0) return fmt::format("{}s", seconds);
  if (hours == 0) return fmt::format("{}m{:02}s", minutes, seconds % 60);
  if (hours < 48) return fmt::format("{}h{:02}m", hours, minutes % 60);
  return fmt::format("{}d{:02}h", hours / 24, hours % 24);
}

std::string ShareText(uint64_t part, uint64_t whole) {
  if (whole == 0) return "-";
  const double share = 100 * static_cast<double>(part) / static_cast<double>(whole);
  int64_t percent = std::llround(share);
  if (part > 0) percent = std::max<int64_t>(percent, 1);
  if (part < whole) percent = std::min<int64_t>(percent, 99);
  return fmt::format("{} %", percent);
}

}  // namespace tandem::cli
