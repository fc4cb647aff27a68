#include "common/config/bytes.h"

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>

#include "common/base/status.h"

namespace tandem {

absl::StatusOr<int64_t> ParseBytes(std::string_view text) {
  double number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  std::string unit;
  for (const char* c = stop; c != end; ++c) {
    if (*c != ' ') unit += static_cast<char>(std::toupper(static_cast<unsigned char>(*c)));
  }
  if (unit.ends_with('B')) unit.pop_back();
  double factor = 0;
  if (unit.empty()) factor = 1;
  constexpr std::string_view kPrefixes = "KMGT";
  if (!unit.empty() && unit.size() <= 2 && (unit.size() == 1 || unit[1] == 'I')) {
    const size_t power = kPrefixes.find(unit[0]);
    const double base = unit.size() == 2 ? 1024 : 1000;
    if (power != std::string_view::npos) factor = std::pow(base, static_cast<double>(power + 1));
  }
  if (error != std::errc() || factor == 0 || !std::isfinite(number) || number < 0 ||
      number * factor >= 9.2e18) {
    return InvalidArgument("'{}' is not a number of bytes; give e.g. 1048576, 512MiB or 1.5GiB",
                           text);
  }
  return static_cast<int64_t>(std::llround(number * factor));
}

absl::StatusOr<int64_t> ParseCount(std::string_view text) {
  double number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  const std::string_view unit(stop, static_cast<size_t>(end - stop));
  constexpr std::string_view kThousands = "kmg";
  constexpr std::string_view kBinary = "KMG";
  double factor = 0;
  if (unit.empty()) factor = 1;
  if (unit.size() == 1) {
    const size_t thousands = kThousands.find(unit[0]);
    const size_t binary = kBinary.find(unit[0]);
    if (thousands != std::string_view::npos) factor = std::pow(1e3, thousands + 1);
    if (binary != std::string_view::npos) factor = std::pow(1024, binary + 1);
  }
  const double count = number * factor;
  if (error != std::errc() || factor == 0 || !(std::abs(count) < 9.2e18) ||
      count != std::round(count)) {
    return InvalidArgument(
        "'{}' is not a number of tokens; give an integer, 32k (32000) or 32K (32768)", text);
  }
  return static_cast<int64_t>(count);
}

std::string ExactBytes(int64_t bytes) {
  constexpr std::array<const char*, 4> kUnits = {"KiB", "MiB", "GiB", "TiB"};
  std::string out = std::to_string(bytes);
  for (const char* unit : kUnits) {
    if (bytes == 0 || bytes % 1024 != 0) break;
    bytes /= 1024;
    out = std::to_string(bytes) + unit;
  }
  return out;
}

std::string FormatBytes(int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto size = static_cast<double>(bytes);
  size_t unit = 0;
  // 1023.6 KiB would be shown as 1024.
  while (size >= 1023.5 && unit + 1 < kUnits.size()) {
    size /= 1024;
    ++unit;
  }
  const bool whole = unit == 0 || size >= 99.95;
  return fmt::format("{:.{}f} {}", size, whole ? 0 : 1, kUnits[unit]);
}

}  // namespace tandem
