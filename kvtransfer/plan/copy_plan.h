// Which bytes of a source pool become which bytes of a target pool. Pure functions: no sockets, no
// memory access, no clock.
//
// Heads are numbered over the whole model, so that a pool that holds only some of them (tensor
// parallelism) and one that holds others can still say which pages they share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"

namespace tandem::kvtransfer {

// KV heads [begin, begin + count) of the model.
struct HeadRange {
  int begin = 0;
  int count = 0;

  int end() const { return begin + count; }
  bool Contains(const HeadRange& other) const {
    return other.begin >= begin && other.end() <= end();
  }
  bool operator==(const HeadRange&) const = default;
};

// The heads that both ranges hold; count 0 if there are none.
HeadRange Intersect(const HeadRange& a, const HeadRange& b);

// The two pages of a head in a block.
enum class PageKind { kKey = 0, kValue = 1 };

// What a plan needs to know of a pool; its memory is not touched.
struct KvPoolShape {
  KvLayout layout;  // num_kv_heads: of this pool
  int num_blocks = 0;
  int first_head = 0;

  HeadRange heads() const { return {first_head, layout.num_kv_heads}; }
  uint64_t TotalBytes() const {
    return uint64_t{layout.BlockBytes()} * static_cast<uint64_t>(num_blocks);
  }
  // Bytes from the pool's base to `block` of `layer`.
  uint64_t BlockOffset(int layer, int32_t block) const {
    return (static_cast<uint64_t>(layer) * static_cast<uint64_t>(num_blocks) +
            static_cast<uint64_t>(block)) *
           layout.BlockLayerBytes();
  }
  // The same to the page of `head`, which is one of heads().
  uint64_t PageOffset(int layer, int32_t block, PageKind kind, int head) const {
    const auto page = static_cast<uint64_t>(static_cast<int>(kind) * layout.num_kv_heads) +
                      static_cast<uint64_t>(head - first_head);
    return BlockOffset(layer, block) + page * layout.PageBytes();
  }
  bool operator==(const KvPoolShape&) const = default;
};

KvPoolShape ShapeOf(const KvRegion& region);

// One contiguous copy. Offsets are bytes from the base of each pool.
struct CopyPiece {
  uint64_t source_offset = 0;
  uint64_t target_offset = 0;
  uint64_t bytes = 0;

  bool operator==(const CopyPiece&) const = default;
};

// Pages of some blocks of some layers: source_blocks[i] of one pool -> target_blocks[i] of another.
struct BlockRun {
  int layer_begin = 0;
  int layer_count = 1;
  HeadRange heads;
  std::span<const int32_t> source_blocks;
  std::span<const int32_t> target_blocks;

  // Of one block of one layer.
  uint64_t BytesPerBlock(const KvLayout& layout) const {
    return 2 * static_cast<uint64_t>(heads.count) * layout.PageBytes();
  }
  uint64_t Bytes(const KvLayout& layout) const {
    return source_blocks.size() * static_cast<uint64_t>(layer_count) * BytesPerBlock(layout);
  }
};

// OK if `layout` is one that can be shipped: positive sizes, and a block of one layer at most
// kMaxBlockLayerBytes. INVALID_ARGUMENT names the field.
inline constexpr size_t kMaxBlockLayerBytes = size_t{32} << 20;
absl::Status ValidateLayout(const KvLayout& layout);

// OK if the shape's layout is valid and its blocks and heads are within what frames can name.
absl::Status ValidateShape(const KvPoolShape& shape);

// OK if every id is in [0, num_blocks). `what` names the list in the message.
absl::Status ValidateBlocks(const char* what, std::span<const int32_t> blocks, int num_blocks);

// OK if a page of one pool means the same in the other: all of the layout but the number of heads
// must be equal, and they must share heads. FAILED_PRECONDITION names the field and both values.
absl::Status CheckConvertible(const KvPoolShape& a, const KvPoolShape& b,
                              const std::string& a_name = "source",
                              const std::string& b_name = "target");

// OK if the pools are convertible and every layer, head and block of `run` is within both.
// INVALID_ARGUMENT names what is not.
absl::Status CheckRun(const KvPoolShape& source, const KvPoolShape& target, const BlockRun& run);

// The copies of `run`: layer after layer, in the order of its blocks, K before V, head after head;
// what is adjacent in both pools is merged into one piece. Errors as CheckRun.
absl::StatusOr<std::vector<CopyPiece>> BuildCopyPlan(const KvPoolShape& source,
                                                     const KvPoolShape& target,
                                                     const BlockRun& run);

// A maximal run of ordinals o, o + 1, ... found in one pushed list: [begin, begin + count) of the
// list. No run is longer than `max_count` (> 0).
struct OrdinalRun {
  size_t begin = 0;
  size_t count = 0;

  bool operator==(const OrdinalRun&) const = default;
};
std::vector<OrdinalRun> SplitIntoRuns(std::span<const int32_t> ordinals, size_t max_count);

}  // namespace tandem::kvtransfer
