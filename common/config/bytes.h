// Numbers of bytes as people write them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace tandem {

// "1048576", "1.5G" (powers of 1000: K, M, G, T), "2GiB" (powers of 1024: KiB, MiB, GiB, TiB); case
// and a blank before the unit do not matter, a trailing B is optional. InvalidArgument otherwise.
absl::StatusOr<int64_t> ParseBytes(std::string_view text);

// Numbers of tokens as vLLM takes them: "32768", "32k" (thousands; also m, g, and 1.5k), "32K"
// (times 1024; also M, G, whole numbers only). InvalidArgument otherwise.
absl::StatusOr<int64_t> ParseCount(std::string_view text);

// What ParseBytes reads as exactly this number, as short as that can be: "1GiB", "1000".
std::string ExactBytes(int64_t bytes);

// For people: "512 B", "188 KiB", "7.6 GiB".
std::string FormatBytes(int64_t bytes);

}  // namespace tandem
