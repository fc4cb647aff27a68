#include "kvtransfer/plan/copy_plan.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {

absl::Status ValidateLayout(const KvLayout& layout) {
  // Bounds keep every product below well inside 64 bits, whatever a peer announces.
  constexpr int kMaxDimension = 1 << 16;
  const struct {
    const char* name;
    int value;
  } fields[] = {{"num_layers", layout.num_layers},
                {"num_kv_heads", layout.num_kv_heads},
                {"head_dim", layout.head_dim},
                {"block_size", layout.block_size}};
  for (const auto& field : fields) {
    if (field.value < 1 || field.value > kMaxDimension) {
      return InvalidArgument("layout.{} must be in [1, {}], got {}", field.name, kMaxDimension,
                             field.value);
    }
  }
  if (layout.BlockLayerBytes() > kMaxBlockLayerBytes) {
    return InvalidArgument(
        "a block of one layer has {} bytes, more than {}; use a smaller block_size",
        layout.BlockLayerBytes(), kMaxBlockLayerBytes);
  }
  return absl::OkStatus();
}

absl::Status ValidateBlocks(const char* what, std::span<const int32_t> blocks, int num_blocks) {
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] < 0 || blocks[i] >= num_blocks) {
      return InvalidArgument("{}[{}] must be in [0, {}), got {}", what, i, num_blocks, blocks[i]);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<CopyPiece>> BuildCopyPlan(const KvPoolShape& source,
                                                     const KvPoolShape& target,
                                                     std::span<const int32_t> source_blocks,
                                                     std::span<const int32_t> target_blocks,
                                                     int layer_begin, int layer_count) {
  if (source.layout != target.layout) {
    return InvalidArgument("source and target pools have different layouts");
  }
  TANDEM_RETURN_IF_ERROR(ValidateLayout(source.layout));
  if (source_blocks.size() != target_blocks.size()) {
    return InvalidArgument("{} source blocks for {} target blocks", source_blocks.size(),
                           target_blocks.size());
  }
  const int num_layers = source.layout.num_layers;
  if (layer_begin < 0 || layer_count < 0 || layer_begin > num_layers ||
      layer_count > num_layers - layer_begin) {
    return InvalidArgument("layers [{}, {} + {}) are not within the layout's {}", layer_begin,
                           layer_begin, layer_count, num_layers);
  }
  TANDEM_RETURN_IF_ERROR(ValidateBlocks("source_blocks", source_blocks, source.num_blocks));
  TANDEM_RETURN_IF_ERROR(ValidateBlocks("target_blocks", target_blocks, target.num_blocks));

  const uint64_t bytes = source.layout.BlockLayerBytes();
  std::vector<CopyPiece> pieces;
  for (int layer = layer_begin; layer < layer_begin + layer_count; ++layer) {
    for (size_t i = 0; i < source_blocks.size(); ++i) {
      const uint64_t from = source.Offset(layer, source_blocks[i]);
      const uint64_t to = target.Offset(layer, target_blocks[i]);
      if (!pieces.empty() && pieces.back().source_offset + pieces.back().bytes == from &&
          pieces.back().target_offset + pieces.back().bytes == to) {
        pieces.back().bytes += bytes;
      } else {
        pieces.push_back({from, to, bytes});
      }
    }
  }
  return pieces;
}

std::vector<OrdinalRun> SplitIntoRuns(std::span<const int32_t> ordinals, size_t max_count) {
  std::vector<OrdinalRun> runs;
  for (size_t i = 0; i < ordinals.size(); ++i) {
    if (!runs.empty() && runs.back().count < max_count && ordinals[i - 1] < INT32_MAX &&
        ordinals[i] == ordinals[i - 1] + 1) {
      ++runs.back().count;
    } else {
      runs.push_back({i, 1});
    }
  }
  return runs;
}

}  // namespace tandem::kvtransfer
