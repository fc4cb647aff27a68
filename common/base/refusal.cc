#include "common/base/refusal.h"

#include <array>
#include <charconv>
#include <string>

#include "absl/strings/cord.h"
#include "fmt/format.h"

namespace tandem {
namespace {

constexpr char kUrl[] = "tandem.internal/refusal";

}  // namespace

absl::Status WithRefusal(absl::Status status, const Refusal& refusal) {
  status.SetPayload(kUrl, absl::Cord(fmt::format("{} {} {} {}", static_cast<int>(refusal.reason),
                                                 refusal.needed, refusal.available, refusal.lost)));
  return status;
}

std::optional<Refusal> RefusalOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kUrl);
  if (!payload) return std::nullopt;
  const std::string text(*payload);
  std::array<int, 4> numbers = {};
  const char* at = text.data();
  const char* const end = at + text.size();
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (i > 0 && (at == end || *at++ != ' ')) return std::nullopt;
    const std::from_chars_result read = std::from_chars(at, end, numbers[i]);
    if (read.ec != std::errc() || numbers[i] < 0) return std::nullopt;
    at = read.ptr;
  }
  if (at != end || numbers[0] > static_cast<int>(Refusal::Reason::kLeaving) ||
      numbers[3] >= 1 << kMaxPrefillWorkers) {
    return std::nullopt;
  }
  return Refusal{static_cast<Refusal::Reason>(numbers[0]), numbers[1], numbers[2],
                 static_cast<uint32_t>(numbers[3])};
}

}  // namespace tandem
