// The KV pool's blocks: who owns which, and when a block may be used again.
//
//   FREE -> exclusive to one lease (written, sealed) -> FREE
//             |      \-> QUARANTINE -> FREE
//             \-> shared: known to the prefix cache, any number of leases -> cached, idle -> FREE
//
// The pool knows who holds a block; what a block is worth when nobody holds it is the business of
// an Evictor (the prefix cache), which the pool asks through two calls and otherwise does not know.
//
// Every operation is O(1) per block. Not thread-safe: the worker's loop owns pool, leases and
// cache.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"

namespace tandem::engine {

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

  // Null for a lease that never held a block.
  const BlockPool* pool() const { return pool_; }

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

  bool operator==(const BlockPoolCounts&) const = default;
};

// Decides which kept blocks go when the pool needs room. Neither call may call the pool back.
class Evictor {
 public:
  virtual ~Evictor() = default;

  // The last lease of a kept block has ended. Blocks with the same `stamp` were released together,
  // children before their parents. False: the evictor has forgotten the block, which becomes free.
  virtual bool OnIdle(int32_t block, uint64_t stamp) = 0;
  // Forgets the idle kept block whose loss costs least, and returns it. Called only while there is
  // one.
  virtual int32_t Evict() = 0;
};

class BlockPool {
 public:
  explicit BlockPool(int num_blocks);
  ~BlockPool();  // every lease must be gone: a leaked block is a broken invariant
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // `num_blocks` exclusive blocks, evicting unreferenced cached blocks (least recently used first,
  // the tail of a chain before its head) as needed. RESOURCE_EXHAUSTED, with nothing changed, if
  // there are not enough. Reserve(0) is an empty lease.
  absl::StatusOr<BlockLease> Reserve(int num_blocks);
  // Blocks that Reserve could hand out now: free + cached.
  int NumAvailable() const { return num_free_ + num_idle_; }
  BlockPoolCounts counts() const;

  // A lease whose remote writer is not known to be quiet: its exclusive blocks wait in quarantine,
  // its shared ones are released. Returns a ticket, never 0.
  uint64_t Quarantine(BlockLease lease);
  // The writer is quiet or its channel dead: the blocks become free. Unknown tickets are ignored
  // (idempotent).
  void ReleaseQuarantine(uint64_t ticket);

  // ---- for the evictor ----
  // One at a time; null once it has given up all kept blocks.
  void SetEvictor(Evictor* evictor);
  // A block that some lease holds becomes read-only, and stays when its last lease ends.
  void Keep(int32_t block);
  // A kept block becomes an ordinary one: free at once, or when its last lease ends.
  void Unkeep(int32_t block);
  // One more lease of kept blocks, idle or not.
  BlockLease Share(std::vector<int32_t> blocks);
  // Of the block's current use: grows whenever the block is handed out anew.
  uint64_t generation(int32_t block) const { return blocks_[Index(block)].generation; }

 private:
  friend class BlockLease;  // ReleaseAll

  struct Block {
    enum class State : uint8_t { kFree, kUsed, kIdle, kQuarantined };
    State state = State::kFree;
    bool kept = false;       // kUsed or kIdle: the evictor knows it
    int32_t references = 0;  // leases that hold it
    int32_t next_free = -1;
    uint64_t generation = 0;
  };

  size_t Index(int32_t block) const;
  int32_t PopFree();
  void PushFree(int32_t block);
  void ReleaseAll(std::span<const int32_t> blocks);
  void DropReference(int32_t block, uint64_t stamp);

  std::vector<Block> blocks_;
  int32_t free_head_ = -1;
  int num_free_ = 0;
  int num_used_ = 0;
  int num_idle_ = 0;  // kept, and held by no lease
  int num_quarantined_ = 0;
  Evictor* evictor_ = nullptr;
  uint64_t release_stamp_ = 0;
  uint64_t last_ticket_ = 0;
  absl::flat_hash_map<uint64_t, std::vector<int32_t>> quarantine_;  // by ticket
};

}  // namespace tandem::engine
