// One rank's part of a model, with tensor parallelism as Megatron-LM has it (Shoeybi et al., 2019,
// arXiv:1909.08053): a rank has some of the KV heads with the query heads that share them, and some
// of the feed-forward block's inner columns. What leads into these is split by rows, what leads out
// of them by columns, so that the ranks' outputs are parts of a sum: one sum behind attention, one
// behind the feed-forward block. Embedding, norms and head are every rank's.
#pragma once

#include <cstddef>
#include <optional>
#include <string_view>

#include "absl/status/statusor.h"

#include "common/base/model_config.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"

namespace tandem::engine {

struct Shard {
  int rank = 0;
  int size = 1;  // ranks

  bool whole() const { return size == 1; }
};

// The description of the part. INVALID_ARGUMENT names what the ranks do not divide.
absl::StatusOr<ModelConfig> ShardOf(const ModelConfig& config, const Shard& shard);

// Which dimension of a tensor of a layer is split; none: every rank has all of it.
std::optional<size_t> ShardedDimension(std::string_view tensor);
// Whether the tensor is added to a sum over ranks, so that one rank alone may have it.
bool BelongsToTheFirstRank(std::string_view tensor);

// The part of `view`, where `dimension` is split. Its data is that of `view`, or in `memory`, which
// grows.
TensorView ShardOf(const TensorView& view, size_t dimension, const Shard& shard,
                   MemoryBlock* memory);

}  // namespace tandem::engine
