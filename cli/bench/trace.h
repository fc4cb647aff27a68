// Request traces in Mooncake's JSON Lines: one object a line with timestamp (ms), input_length,
// output_length (tokens) and hash_ids, one for each block of the prompt.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::cli {

struct TraceEntry {
  double timestamp_ms = 0;
  int input_length = 0;
  int output_length = 0;
  std::vector<uint64_t> hash_ids;
};

// The first `max_entries`. INVALID_ARGUMENT names the line and the field.
absl::StatusOr<std::vector<TraceEntry>> ParseTrace(std::string_view text, size_t max_entries);

}  // namespace tandem::cli
