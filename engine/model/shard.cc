#include "engine/model/shard.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/base/status.h"

namespace tandem::engine {
namespace {

// Into heads and inner columns; with their biases.
constexpr std::array<std::string_view, 10> kRows = {
    ".q_proj.weight", ".k_proj.weight", ".v_proj.weight",  ".gate_proj.weight", ".q_proj.bias",
    ".k_proj.bias",   ".v_proj.bias",   ".up_proj.weight", ".up_proj.bias",     ".gate_proj.bias"};
// Out of them.
constexpr std::array<std::string_view, 2> kColumns = {".o_proj.weight", ".down_proj.weight"};
constexpr std::array<std::string_view, 2> kSummed = {".o_proj.bias", ".down_proj.bias"};

template <typename Suffixes>
bool EndsWithAny(std::string_view name, const Suffixes& suffixes) {
  return std::any_of(suffixes.begin(), suffixes.end(),
                     [name](std::string_view suffix) { return name.ends_with(suffix); });
}

absl::Status Divide(const char* what, int size, int* count) {
  if (*count % size != 0) {
    return InvalidArgument(
        "--tensor-parallel-size={} does not divide the model's {} ({}); choose a size that does",
        size, what, *count);
  }
  *count /= size;
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ShardOf(const ModelConfig& config, const Shard& shard) {
  ModelConfig part = config;
  TANDEM_RETURN_IF_ERROR(Divide("KV heads", shard.size, &part.num_kv_heads));
  TANDEM_RETURN_IF_ERROR(Divide("query heads", shard.size, &part.num_heads));
  TANDEM_RETURN_IF_ERROR(Divide("intermediate_size", shard.size, &part.intermediate_size));
  return part;
}

std::optional<size_t> ShardedDimension(std::string_view tensor) {
  if (EndsWithAny(tensor, kRows)) return 0;
  if (EndsWithAny(tensor, kColumns)) return 1;
  return std::nullopt;
}

bool BelongsToTheFirstRank(std::string_view tensor) { return EndsWithAny(tensor, kSummed); }

TensorView ShardOf(const TensorView& view, size_t dimension, const Shard& shard,
                   MemoryBlock* memory) {
  size_t outer = 1;
  for (size_t i = 0; i < dimension; ++i) outer *= static_cast<size_t>(view.shape[i]);
  const size_t whole = view.bytes / outer, part = whole / static_cast<size_t>(shard.size);
  const size_t first = part * static_cast<size_t>(shard.rank);
  TensorView out = view;
  out.shape[dimension] /= shard.size;
  out.bytes = outer * part;
  if (outer == 1) {
    out.data = view.data + first;
    return out;
  }
  if (memory->size() < out.bytes) *memory = MemoryBlock(out.bytes);
  auto* data = static_cast<std::byte*>(memory->data());
  for (size_t i = 0; i < outer; ++i) {
    std::memcpy(data + i * part, view.data + i * whole + first, part);
  }
  out.data = data;
  out.file = nullptr;
  return out;
}

}  // namespace tandem::engine
