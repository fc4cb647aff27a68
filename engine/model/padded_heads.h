// Query heads of zeros, for models in which not a power of two of query heads shares a KV head: in
// Qwen2.5-7B groups of 7 become groups of 8. Kernels with tiles of so many heads are then full.
//
// The zeros stand behind each group's own heads, so that every head keeps its KV head; their
// columns of the output projection are zeros as well, so that what they attend to adds nothing: the
// output is the same, but for the order in which sums are taken. (Copies of some heads behind *all*
// heads, which circulate as a remedy, are another model: head h reads KV head h / group, and almost
// every h / 8 is another than h / 7.)
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

#include "common/base/model_config.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"

namespace tandem::engine {

struct HeadPadding {
  int groups = 0;  // KV heads
  int heads = 0;   // query heads of a group in the checkpoint
  int padded = 0;  // and with zeros
  int head_dim = 0;

  // Up to the next power of two.
  static HeadPadding Of(const ModelConfig& config);
  bool adds_heads() const { return padded > heads; }
};

// Which dimension of a tensor of a layer counts query heads; none: none does.
std::optional<size_t> QueryHeadDimension(std::string_view tensor);

// `view`, whose `dimension` has groups * heads * head_dim, with groups * padded * head_dim. Its
// data is in `memory`, which grows.
TensorView PadHeads(const TensorView& view, size_t dimension, const HeadPadding& padding,
                    MemoryBlock* memory);

}  // namespace tandem::engine
