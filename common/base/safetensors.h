// The header of the safetensors format: 8 bytes little-endian header length, a JSON object that
// gives each tensor's dtype, shape and byte range, then the data. Whatever the bytes, parsing ends
// in tensors that lie inside the file or in a Status that names the file and the tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem {

struct SafetensorsEntry {
  std::string dtype;  // as in the file: F32, BF16, I64, ...
  std::vector<int64_t> shape;
  size_t begin = 0;  // bytes from the start of the file
  size_t end = 0;

  int64_t Count() const {
    int64_t count = 1;
    for (const int64_t dimension : shape) count *= dimension;
    return count;
  }
};

// Bytes of JSON that a header may have: the limit of the format itself.
inline constexpr uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

using SafetensorsIndex = std::map<std::string, SafetensorsEntry, std::less<>>;

// Bytes from the start of a file to its data, from its first 8 bytes or more.
absl::StatusOr<size_t> SafetensorsDataBegin(std::span<const std::byte> beginning, size_t file_bytes,
                                            std::string_view origin);

// Parses and checks the header of a file of `file_bytes` bytes; `beginning` holds the header at
// least. The tensors must fill the data part exactly, without gaps or overlaps, as the format
// demands. `origin` (the path) begins every error message.
absl::StatusOr<SafetensorsIndex> ParseSafetensors(std::span<const std::byte> beginning,
                                                  size_t file_bytes, std::string_view origin);

// As it may stand in a message: names may hold any bytes of a hostile file.
std::string PrintableName(std::string_view name);

// "[2, 3]"
std::string ShapeText(std::span<const int64_t> shape);

}  // namespace tandem
