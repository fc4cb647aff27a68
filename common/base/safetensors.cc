#include "common/base/safetensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <set>
#include <utility>

#include "nlohmann/json.hpp"

#include "common/base/status.h"

namespace tandem {
namespace {

using nlohmann::json;

std::optional<size_t> DTypeBytes(std::string_view dtype) {
  static constexpr std::array<std::pair<std::string_view, size_t>, 15> kSizes = {{{"BOOL", 1},
                                                                                  {"U8", 1},
                                                                                  {"I8", 1},
                                                                                  {"F8_E5M2", 1},
                                                                                  {"F8_E4M3", 1},
                                                                                  {"I16", 2},
                                                                                  {"U16", 2},
                                                                                  {"F16", 2},
                                                                                  {"BF16", 2},
                                                                                  {"I32", 4},
                                                                                  {"U32", 4},
                                                                                  {"F32", 4},
                                                                                  {"F64", 8},
                                                                                  {"I64", 8},
                                                                                  {"U64", 8}}};
  for (const auto& [name, size] : kSizes) {
    if (name == dtype) return size;
  }
  return std::nullopt;
}

bool IsCount(const json& value) {
  return value.is_number_unsigned() || (value.is_number_integer() && value.get<int64_t>() >= 0);
}

// The product of the dimensions times `element_bytes`; nullopt on overflow of 2^62.
std::optional<uint64_t> ByteCount(std::span<const int64_t> shape, uint64_t element_bytes) {
  unsigned __int128 bytes = element_bytes;
  bool empty = false;
  for (const int64_t dimension : shape) {
    if (dimension == 0) empty = true;
    bytes *= std::max<uint64_t>(1, static_cast<uint64_t>(dimension));
    if (bytes >> 62 != 0) return std::nullopt;
  }
  return empty ? 0 : static_cast<uint64_t>(bytes);
}

absl::StatusOr<SafetensorsEntry> ParseEntry(const json& value, uint64_t data_bytes) {
  if (!value.is_object()) return InvalidArgument("must be an object");
  const auto dtype = value.find("dtype"), shape = value.find("shape"),
             offsets = value.find("data_offsets");
  if (dtype == value.end() || !dtype->is_string()) return InvalidArgument("dtype is missing");
  if (shape == value.end() || !shape->is_array()) return InvalidArgument("shape is missing");
  SafetensorsEntry entry;
  entry.dtype = dtype->get<std::string>();
  const std::optional<size_t> element_bytes = DTypeBytes(entry.dtype);
  if (!element_bytes)
    return InvalidArgument("dtype \"{}\" is not known", PrintableName(entry.dtype));
  for (const json& dimension : *shape) {
    if (!IsCount(dimension) || dimension.get<uint64_t>() >> 62 != 0) {
      return InvalidArgument("shape must hold non-negative integers below 2^62");
    }
    entry.shape.push_back(static_cast<int64_t>(dimension.get<uint64_t>()));
  }
  if (offsets == value.end() || !offsets->is_array() || offsets->size() != 2 ||
      !IsCount((*offsets)[0]) || !IsCount((*offsets)[1])) {
    return InvalidArgument("data_offsets must be two non-negative integers");
  }
  const uint64_t begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > data_bytes) {
    return InvalidArgument(
        "data_offsets [{}, {}] do not lie in the file's {} data bytes: it is cut off, or its "
        "header is wrong",
        begin, end, data_bytes);
  }
  const std::optional<uint64_t> expected = ByteCount(entry.shape, *element_bytes);
  if (!expected || *expected != end - begin) {
    return InvalidArgument("shape {} of {} does not take the {} bytes of its data_offsets",
                           ShapeText(entry.shape), entry.dtype, end - begin);
  }
  entry.begin = begin;
  entry.end = end;
  return entry;
}

absl::Status CheckCoverage(const SafetensorsIndex& index, uint64_t data_bytes,
                           std::string_view origin) {
  std::vector<std::pair<std::pair<size_t, size_t>, std::string_view>> ranges;
  for (const auto& [name, entry] : index) ranges.push_back({{entry.begin, entry.end}, name});
  std::sort(ranges.begin(), ranges.end());
  size_t position = 0;
  for (const auto& [range, name] : ranges) {
    if (range.first != position) {
      return InvalidArgument(
          "{}: tensor \"{}\": data begins at byte {}, {} the tensor before it, "
          "which ends at {}",
          origin, PrintableName(name), range.first,
          range.first < position ? "inside" : "after a gap behind", position);
    }
    position = range.second;
  }
  if (position != data_bytes) {
    return InvalidArgument("{}: tensors cover {} of {} data bytes", origin, position, data_bytes);
  }
  return absl::OkStatus();
}

}  // namespace

std::string PrintableName(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 120)) out += c >= 0x20 && c < 0x7f ? c : '?';
  return text.size() > 120 ? out + "..." : out;
}

std::string ShapeText(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

absl::StatusOr<size_t> SafetensorsDataBegin(std::span<const std::byte> beginning, size_t file_bytes,
                                            std::string_view origin) {
  if (file_bytes < 8 || beginning.size() < 8) {
    return InvalidArgument("{}: truncated: {} bytes, a safetensors file has at least 8", origin,
                           file_bytes);
  }
  uint64_t header_bytes = 0;
  for (size_t i = 8; i-- > 0;)
    header_bytes = header_bytes << 8 | static_cast<uint64_t>(beginning[i]);
  if (header_bytes > kMaxSafetensorsHeaderBytes || header_bytes > file_bytes - 8) {
    return InvalidArgument(
        "{}: header of {} bytes does not fit a file of {} bytes: truncated or not safetensors",
        origin, header_bytes, file_bytes);
  }
  return 8 + header_bytes;
}

absl::StatusOr<SafetensorsIndex> ParseSafetensors(std::span<const std::byte> beginning,
                                                  size_t file_bytes, std::string_view origin) {
  TANDEM_ASSIGN_OR_RETURN(const size_t data_begin,
                          SafetensorsDataBegin(beginning, file_bytes, origin));
  if (beginning.size() < data_begin) {
    return InvalidArgument("{}: truncated: its header has {} bytes", origin, data_begin);
  }
  const size_t header_bytes = data_begin - 8;
  const char* text = reinterpret_cast<const char*>(beginning.data()) + 8;
  std::set<std::string> names;
  std::string duplicate;
  const auto watch_names = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth == 1 && event == json::parse_event_t::key &&
        !names.insert(parsed.get_ref<const std::string&>()).second) {
      duplicate = parsed.get<std::string>();
    }
    return true;
  };
  const json header = json::parse(text, text + header_bytes, watch_names, false);
  if (!header.is_object()) {
    return InvalidArgument("{}: header is not a valid JSON object", origin);
  }
  if (!duplicate.empty()) {
    return InvalidArgument("{}: tensor \"{}\" is listed twice", origin, PrintableName(duplicate));
  }
  const uint64_t data_bytes = file_bytes - data_begin;
  SafetensorsIndex index;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") continue;
    absl::StatusOr<SafetensorsEntry> entry = ParseEntry(value, data_bytes);
    if (!entry.ok()) {
      return InvalidArgument("{}: tensor \"{}\": {}", origin, PrintableName(name),
                             MessageOf(entry.status()));
    }
    index.emplace(name, *std::move(entry));
  }
  TANDEM_RETURN_IF_ERROR(CheckCoverage(index, data_bytes, origin));
  for (auto& [name, entry] : index) {
    entry.begin += data_begin;
    entry.end += data_begin;
  }
  return index;
}

}  // namespace tandem
