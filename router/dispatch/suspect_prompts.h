// Prompts that a worker died with shortly after it had got them. A request that ends a process (a
// broken invariant, memory that runs out, a fault of a device) ends each one that it is sent to, so
// after two of them it is sent to no third: not by this router's own retries, and not when the
// client sends it again.
//
// A process counts once, however many requests with this prompt it had, and not at all if it turns
// out to live.
//
// Thread-safe. Bounded: the oldest are forgotten first, and everything after a while.
#pragma once

#include <cstddef>
#include <list>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/block_hash.h"
#include "common/base/clock.h"
#include "router/dispatch/loss.h"

namespace tandem::router {

class SuspectPrompts {
 public:
  static constexpr int kMaxDeaths = 2;

  // `clock` outlives this.
  explicit SuspectPrompts(Clock* clock, size_t capacity = 4096,
                          absl::Duration memory = absl::Minutes(10));

  // A worker was lost with it.
  void NoteLoss(const Hash128& prompt, const Loss& loss);
  // A worker has served it: it is not to blame.
  void NoteServed(const Hash128& prompt);
  // Whether it has had its kMaxDeaths, as far as `view` knows; those that live are forgotten.
  bool IsPoison(const Hash128& prompt, const ClusterView& view);
  // Nothing is remembered, so nothing need be asked.
  bool empty() const;
  absl::Duration memory() const { return memory_; }

 private:
  struct Entry {
    Hash128 prompt;
    std::vector<Loss> losses;  // of different processes, up to kMaxDeaths
    absl::Time last;
  };
  void Forget(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Clock* const clock_;
  const size_t capacity_;
  const absl::Duration memory_;
  mutable absl::Mutex mutex_;
  std::list<Entry> entries_ ABSL_GUARDED_BY(mutex_);  // by `last`, oldest first
  absl::flat_hash_map<Hash128, std::list<Entry>::iterator> by_prompt_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::router
