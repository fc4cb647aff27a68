#include "engine/model/padded_heads.h"

#include <bit>
#include <cstring>
#include <utility>

namespace tandem::engine {

HeadPadding HeadPadding::Of(const ModelConfig& config) {
  const int heads = config.num_heads / config.num_kv_heads;
  return {config.num_kv_heads, heads, static_cast<int>(std::bit_ceil(static_cast<unsigned>(heads))),
          config.head_dim};
}

std::optional<size_t> QueryHeadDimension(std::string_view tensor) {
  if (tensor.ends_with(".q_proj.weight") || tensor.ends_with(".q_proj.bias")) return 0;
  if (tensor.ends_with(".o_proj.weight")) return 1;
  return std::nullopt;
}

TensorView PadHeads(const TensorView& view, size_t dimension, const HeadPadding& padding,
                    MemoryBlock* memory) {
  size_t outer = 1, inner = ElementSize(view.element);
  for (size_t i = 0; i < dimension; ++i) outer *= static_cast<size_t>(view.shape[i]);
  for (size_t i = dimension + 1; i < view.shape.size(); ++i) {
    inner *= static_cast<size_t>(view.shape[i]);
  }
  const size_t groups = outer * static_cast<size_t>(padding.groups);
  const size_t head = static_cast<size_t>(padding.head_dim) * inner;
  const size_t from = static_cast<size_t>(padding.heads) * head;
  const size_t to = static_cast<size_t>(padding.padded) * head;
  TensorView padded{view.element, view.shape, nullptr, groups * to};
  padded.shape[dimension] = int64_t{padding.groups} * padding.padded * padding.head_dim;
  if (memory->size() < padded.bytes) *memory = MemoryBlock(padded.bytes);
  auto* out = static_cast<std::byte*>(memory->data());
  padded.data = out;
  for (size_t i = 0; i < groups; ++i) {
    std::memcpy(out + i * to, view.data + i * from, from);
    std::memset(out + i * to + from, 0, to - from);
  }
  return padded;
}

}  // namespace tandem::engine
