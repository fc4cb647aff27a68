// The KV pool's blocks: who owns which, and when a block may be used again.
//
//   FREE -> RESERVED -> (written, sealed) -> SHARED(ref count) -> cached (ref count 0, LRU) -> FREE
//                 \-> QUARANTINE -> FREE
//
// Every operation is O(1) per block. Not thread-safe: the worker's loop owns pool, leases and
// cache.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/block_hash.h"
#include "common/base/kv_layout.h"

namespace tandem {

class BlockPool;

// RAII ownership of blocks of one sequence, in sequence order. A block is either exclusive (this
// lease may write it) or shared (read-only; it is also known to the prefix cache and perhaps to
// other leases). The destructor gives all back: exclusive blocks to the free list, shared ones by
// dropping a reference. Move-only. Must die before its pool.
class BlockLease {
 public:
  BlockLease() = default;
  BlockLease(BlockLease&& other) noexcept;
  BlockLease& operator=(BlockLease&& other) noexcept;
  ~BlockLease();

  std::span<const int32_t> blocks() const { return blocks_; }
  int size() const { return static_cast<int>(blocks_.size()); }
  bool empty() const { return blocks_.empty(); }

  // Appends another lease's blocks of the same pool; `other` is empty afterwards.
  void Append(BlockLease other);
  // Splits off blocks [from, size()).
  BlockLease SplitTail(int from);
  void Release();

 private:
  friend class BlockPool;
  BlockLease(BlockPool* pool, std::vector<int32_t> blocks)
      : pool_(pool), blocks_(std::move(blocks)) {}
  BlockPool* pool_ = nullptr;
  std::vector<int32_t> blocks_;
};

struct BlockPoolCounts {
  int total = 0;
  int free = 0;         // never used or no longer cached
  int cached = 0;       // held by the prefix cache only: reusable, evictable
  int used = 0;         // held by at least one lease
  int quarantined = 0;  // a remote writer may still touch them
};

class BlockPool {
 public:
  explicit BlockPool(int num_blocks);
  ~BlockPool();  // every lease must be gone: a leaked block is a broken invariant

  // `num_blocks` exclusive blocks, evicting unreferenced cached blocks (least recently used first)
  // as needed. RESOURCE_EXHAUSTED, with nothing changed, if there are not enough. Reserve(0) is an
  // empty lease.
  absl::StatusOr<BlockLease> Reserve(int num_blocks);
  // Blocks that Reserve could hand out now: free + cached.
  int NumAvailable() const;
  BlockPoolCounts counts() const;

  // A lease whose remote writer is not known to be quiet: its exclusive blocks wait in quarantine.
  // Returns a ticket.
  uint64_t Quarantine(BlockLease lease);
  // The writer is quiet or its channel dead: the blocks become free. Unknown tickets are ignored
  // (idempotent).
  void ReleaseQuarantine(uint64_t ticket);

  // Of the block's current use: grows whenever the block is handed out anew.
  uint64_t generation(int32_t block) const;

 private:
  friend class BlockLease;
  friend class PrefixCache;
  // (state per block, intrusive free and LRU lists: engine/kv/block_pool.cc)
};

}  // namespace tandem
