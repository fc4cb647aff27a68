// Which worker's prefix cache holds which blocks, as far as the workers' events tell.
//
// Thread-safe: one reader-writer lock, held for one event message or one walk. Knowledge is a hint:
// a worker that forgets a block before it says so costs recomputation, never a wrong answer.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/container/inlined_vector.h"
#include "absl/synchronization/mutex.h"

#include "common/base/block_hash.h"

namespace tandem::router {

class PrefixIndex {
 public:
  // A worker's number in here, not used again for another.
  using Slot = uint32_t;

  // `max_blocks`: what the worker's pool can hold; stored events beyond it are not remembered.
  Slot AddWorker(size_t max_blocks);
  // Time proportional to the worker's blocks.
  void RemoveWorker(Slot worker);
  // One event message: with `cleared` all that was known goes first, then `stored`, then `removed`.
  // Events of a removed worker are dropped.
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
  using Holders = absl::InlinedVector<Slot, 4>;
  struct Worker {
    size_t max_blocks;
    absl::flat_hash_set<Hash128> blocks;
  };

  void Erase(Slot worker, const Hash128& hash) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable absl::Mutex mutex_;
  Slot next_slot_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::flat_hash_map<Hash128, Holders> holders_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<Slot, Worker> workers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::router
