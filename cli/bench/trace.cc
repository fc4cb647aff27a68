#include "cli/bench/trace.h"

#include <algorithm>
#include <limits>

#include "nlohmann/json.hpp"

#include "common/base/status.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHashId = (uint64_t{1} << 62) - 1;  // larger ones name other pieces

absl::Status Read(const json& object, const char* key, int* out) {
  const auto it = object.find(key);
  if (it == object.end() || !it->is_number_integer() || *it < 1 ||
      *it > std::numeric_limits<int>::max()) {
    return InvalidArgument("{} must be an integer >= 1", key);
  }
  *out = it->get<int>();
  return absl::OkStatus();
}

absl::StatusOr<TraceEntry> ParseEntry(std::string_view line) {
  const json object = json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return InvalidArgument("must be a JSON object");
  TraceEntry entry;
  const auto timestamp = object.find("timestamp");
  if (timestamp == object.end() || !timestamp->is_number() || *timestamp < 0) {
    return InvalidArgument("timestamp must be a number >= 0 (ms)");
  }
  entry.timestamp_ms = timestamp->get<double>();
  TANDEM_RETURN_IF_ERROR(Read(object, "input_length", &entry.input_length));
  TANDEM_RETURN_IF_ERROR(Read(object, "output_length", &entry.output_length));
  const auto ids = object.find("hash_ids");
  if (ids == object.end() || !ids->is_array()) return InvalidArgument("hash_ids must be a list");
  for (const json& id : *ids) {
    if (!id.is_number_unsigned() || id > kMaxHashId) {
      return InvalidArgument("hash_ids must be integers in [0, 2^62)");
    }
    entry.hash_ids.push_back(id.get<uint64_t>());
  }
  return entry;
}

}  // namespace

absl::StatusOr<std::vector<TraceEntry>> ParseTrace(std::string_view text, size_t max_entries) {
  std::vector<TraceEntry> out;
  int number = 0;
  while (!text.empty() && out.size() < max_entries) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(text.size(), line.size() + 1));
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    absl::StatusOr<TraceEntry> entry = ParseEntry(line);
    if (!entry.ok()) return InvalidArgument("line {}: {}", number, MessageOf(entry.status()));
    if (!out.empty() && entry->timestamp_ms < out.back().timestamp_ms) {
      return InvalidArgument("line {}: timestamp goes back", number);
    }
    out.push_back(*std::move(entry));
  }
  return out;
}

}  // namespace tandem::cli
