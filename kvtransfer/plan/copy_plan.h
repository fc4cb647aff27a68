// Which bytes of a source pool become which bytes of a target pool. Pure functions: no sockets, no
// memory access, no clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"

namespace tandem::kvtransfer {

// What a plan needs to know of a pool; its memory is not touched.
struct KvPoolShape {
  KvLayout layout;
  int num_blocks = 0;

  // Bytes from the pool's base to `block` of `layer`.
  uint64_t Offset(int layer, int32_t block) const {
    return (static_cast<uint64_t>(layer) * static_cast<uint64_t>(num_blocks) +
            static_cast<uint64_t>(block)) *
           layout.BlockLayerBytes();
  }
};

// One contiguous copy. Offsets are bytes from the base of each pool.
struct CopyPiece {
  uint64_t source_offset = 0;
  uint64_t target_offset = 0;
  uint64_t bytes = 0;

  bool operator==(const CopyPiece&) const = default;
};

// OK if `layout` is one that can be shipped: positive sizes, and a block of one layer at most
// kMaxBlockLayerBytes. INVALID_ARGUMENT names the field.
inline constexpr size_t kMaxBlockLayerBytes = size_t{32} << 20;
absl::Status ValidateLayout(const KvLayout& layout);

// OK if every id is in [0, num_blocks). `what` names the list in the message.
absl::Status ValidateBlocks(const char* what, std::span<const int32_t> blocks, int num_blocks);

// The copies that move layers [layer_begin, layer_begin + layer_count) of source_blocks[i] to
// target_blocks[i], layer after layer, in the order of i. Neighbours that are adjacent in both
// pools are merged into one piece. INVALID_ARGUMENT if layouts differ, the lists differ in length,
// or an id or layer is out of range.
absl::StatusOr<std::vector<CopyPiece>> BuildCopyPlan(const KvPoolShape& source,
                                                     const KvPoolShape& target,
                                                     std::span<const int32_t> source_blocks,
                                                     std::span<const int32_t> target_blocks,
                                                     int layer_begin, int layer_count);

// A maximal run of ordinals o, o + 1, ... found in one pushed list: [begin, begin + count) of the
// list. No run is longer than `max_count` (> 0).
struct OrdinalRun {
  size_t begin = 0;
  size_t count = 0;

  bool operator==(const OrdinalRun&) const = default;
};
std::vector<OrdinalRun> SplitIntoRuns(std::span<const int32_t> ordinals, size_t max_count);

}  // namespace tandem::kvtransfer
