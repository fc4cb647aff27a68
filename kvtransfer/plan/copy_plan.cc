#include "kvtransfer/plan/copy_plan.h"

#include <algorithm>

#include "common/base/status.h"

namespace tandem::kvtransfer {
namespace {

// Bounds keep every product below well inside 64 bits, whatever a peer announces.
constexpr int kMaxDimension = 1 << 16;
constexpr int kMaxBlocks = 1 << 22;

}  // namespace

HeadRange Intersect(const HeadRange& a, const HeadRange& b) {
  const int begin = std::max(a.begin, b.begin);
  return {begin, std::max(0, std::min(a.end(), b.end()) - begin)};
}

KvPoolShape ShapeOf(const KvRegion& region) {
  return {region.layout, region.num_blocks, region.first_kv_head};
}

absl::Status ValidateLayout(const KvLayout& layout) {
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

absl::Status ValidateShape(const KvPoolShape& shape) {
  TANDEM_RETURN_IF_ERROR(ValidateLayout(shape.layout));
  if (shape.num_blocks < 0 || shape.num_blocks > kMaxBlocks) {
    return InvalidArgument("num_blocks must be in [0, {}], got {}", kMaxBlocks, shape.num_blocks);
  }
  if (shape.first_head < 0 || shape.first_head > kMaxDimension) {
    return InvalidArgument("first_head must be in [0, {}], got {}", kMaxDimension,
                           shape.first_head);
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

absl::Status CheckConvertible(const KvPoolShape& a, const KvPoolShape& b, const std::string& a_name,
                              const std::string& b_name) {
  const struct {
    const char* name;
    int a;
    int b;
  } fields[] = {{"layers", a.layout.num_layers, b.layout.num_layers},
                {"head_dim", a.layout.head_dim, b.layout.head_dim},
                {"block_size", a.layout.block_size, b.layout.block_size}};
  for (const auto& field : fields) {
    if (field.a != field.b) {
      return FailedPrecondition("KV {}: {} has {}, {} has {}", field.name, a_name, field.a, b_name,
                                field.b);
    }
  }
  if (a.layout.dtype != b.layout.dtype) {
    return FailedPrecondition("KV dtype: {} has {}, {} has {}", a_name, DTypeName(a.layout.dtype),
                              b_name, DTypeName(b.layout.dtype));
  }
  if (Intersect(a.heads(), b.heads()).count == 0) {
    return FailedPrecondition("KV heads: {} has [{}, {}), {} has [{}, {}), none in common", a_name,
                              a.heads().begin, a.heads().end(), b_name, b.heads().begin,
                              b.heads().end());
  }
  return absl::OkStatus();
}

absl::Status CheckRun(const KvPoolShape& source, const KvPoolShape& target, const BlockRun& run) {
  TANDEM_RETURN_IF_ERROR(ValidateShape(source));
  TANDEM_RETURN_IF_ERROR(ValidateShape(target));
  if (const absl::Status status = CheckConvertible(source, target); !status.ok()) {
    return absl::InvalidArgumentError(status.message());
  }
  if (run.source_blocks.size() != run.target_blocks.size()) {
    return InvalidArgument("{} source blocks for {} target blocks", run.source_blocks.size(),
                           run.target_blocks.size());
  }
  const int num_layers = source.layout.num_layers;
  if (run.layer_begin < 0 || run.layer_count < 0 || run.layer_begin > num_layers ||
      run.layer_count > num_layers - run.layer_begin) {
    return InvalidArgument("layers [{}, {} + {}) are not within the layout's {}", run.layer_begin,
                           run.layer_begin, run.layer_count, num_layers);
  }
  if (run.heads.count < 1 || !source.heads().Contains(run.heads) ||
      !target.heads().Contains(run.heads)) {
    return InvalidArgument("heads [{}, {}) are not within those of both pools", run.heads.begin,
                           run.heads.end());
  }
  TANDEM_RETURN_IF_ERROR(ValidateBlocks("source_blocks", run.source_blocks, source.num_blocks));
  TANDEM_RETURN_IF_ERROR(ValidateBlocks("target_blocks", run.target_blocks, target.num_blocks));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<CopyPiece>> BuildCopyPlan(const KvPoolShape& source,
                                                     const KvPoolShape& target,
                                                     const BlockRun& run) {
  TANDEM_RETURN_IF_ERROR(CheckRun(source, target, run));
  const uint64_t bytes = static_cast<uint64_t>(run.heads.count) * source.layout.PageBytes();
  std::vector<CopyPiece> pieces;
  const auto append = [&](int layer, size_t i, PageKind kind) {
    const uint64_t from = source.PageOffset(layer, run.source_blocks[i], kind, run.heads.begin);
    const uint64_t to = target.PageOffset(layer, run.target_blocks[i], kind, run.heads.begin);
    if (!pieces.empty() && pieces.back().source_offset + pieces.back().bytes == from &&
        pieces.back().target_offset + pieces.back().bytes == to) {
      pieces.back().bytes += bytes;
    } else {
      pieces.push_back({from, to, bytes});
    }
  };
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t i = 0; i < run.source_blocks.size(); ++i) {
      append(layer, i, PageKind::kKey);
      append(layer, i, PageKind::kValue);
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
