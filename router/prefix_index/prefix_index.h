// Which worker's prefix cache holds which blocks, as far as the workers' events tell.
//
// Thread-safe. A lookup sees every event message whole or in part: a message of many blocks is
// applied in pieces, between which waiting lookups go first, so that none waits longer than a piece
// takes. Knowledge is a hint: a worker that forgets a block before it says so costs recomputation,
// never a wrong answer.
//
// About 20 to 40 bytes for a block, however many workers hold it. A lookup costs a probe for each
// leading block that somebody holds, and a merge of two sets of workers wherever they change.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "common/base/block_hash.h"
#include "router/prefix_index/holder_sets.h"

namespace tandem::router {

class PrefixIndex {
 public:
  // A worker's number in here, not used again for another.
  using Slot = uint32_t;

  // `max_blocks`: what the worker's pool can hold; stored events beyond it are not remembered.
  Slot AddWorker(size_t max_blocks);
  // From the start of the call no lookup finds the worker. Takes time proportional to all blocks
  // that are known, in which lookups go on.
  void RemoveWorker(Slot worker);
  // One event message: with `cleared` all that was known goes first, then `stored`, then `removed`.
  // Events of a removed worker are dropped. One message of a worker at a time.
  void Apply(Slot worker, bool cleared, std::span<const Hash128> stored,
             std::span<const Hash128> removed);

  struct Match {
    Slot worker;
    int blocks;  // leading blocks of the prompt that it holds; > 0
  };
  // For each worker that holds the first block, how many leading blocks it holds. One walk over the
  // chain, which ends where no worker follows.
  std::vector<Match> Lookup(std::span<const Hash128> chain) const;

  // Distinct blocks known.
  size_t size() const;
  size_t WorkerBlocks(Slot worker) const;

 private:
  // Half of a block's hash, mixed. Two blocks that were taken for each other would cost a wrong
  // hint, and among a million such a pair is a matter of one in thirty million.
  using Key = uint64_t;
  struct KeyHash {
    size_t operator()(Key key) const { return key; }
  };
  // So many that growing one takes microseconds.
  static constexpr size_t kShards = 1024;
  using Shard = absl::flat_hash_map<Key, Holders, KeyHash>;
  struct Worker {
    size_t max_blocks;
    size_t blocks = 0;
    std::optional<Column> column;  // none: there are too many workers, nothing of it is remembered
  };
  enum class Change { kStore, kRemove };

  static Key KeyOf(const Hash128& hash);
  Shard& ShardOf(Key key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return shards_[key >> 54];  // the map uses the lower bits
  }
  const Shard& ShardOf(Key key) const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return shards_[key >> 54];
  }
  void ApplyInPieces(Slot worker, Change change, std::span<const Hash128> hashes);
  void ApplyPiece(Worker* worker, Change change, std::span<const Hash128> hashes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the column out of every block.
  void Sweep(Column column);
  // Lets lookups that wait go first; between two pieces of a long change.
  void Yield() const;

  mutable std::atomic<int> waiting_lookups_ = 0;
  mutable absl::Mutex mutex_;
  Slot next_slot_ ABSL_GUARDED_BY(mutex_) = 0;
  std::array<Shard, kShards> shards_ ABSL_GUARDED_BY(mutex_);
  HolderSets sets_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<Slot, Worker> workers_ ABSL_GUARDED_BY(mutex_);
  // By column; kNoSlot where a column is free, or its worker removed and its blocks not yet.
  static constexpr Slot kNoSlot = ~Slot{0};
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);
  std::vector<Column> free_columns_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::router
