// The sequences of a decode loop and the blocks they hold.
//
// Not thread-safe: part of the loop. A sequence gets its blocks from Admission or Resume, grows by
// Grow, and loses them by Preempt or Release; whatever a launched step still touches waits for that
// step (worker::LaunchedSteps).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "decode_worker/scheduler.h"
#include "decode_worker/sequence.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "worker/launched_steps.h"

namespace tandem::decode {

class RunningSet {
 public:
  // All outlive this.
  RunningSet(engine::BlockPool* pool, engine::PrefixCache* cache, worker::LaunchedSteps* steps);

  // Scheduled behind all of the same or a higher priority.
  void Insert(std::unique_ptr<Sequence> sequence);
  // Null: no open sequence has this Work::id.
  Sequence* Find(uint64_t id) const;
  // Forgets the sequences that are closed.
  void Sweep();

  // Scheduled first to last. Valid until Insert or Sweep.
  const std::vector<std::unique_ptr<Sequence>>& sequences() const { return sequences_; }
  Sequence* at(int i) const { return sequences_[static_cast<size_t>(i)].get(); }
  bool empty() const { return sequences_.empty(); }
  size_t size() const { return sequences_.size(); }
  // For the scheduler; a sequence keeps its index until Insert or Sweep.
  View MakeView() const;

  // False: the blocks are not there.
  bool Grow(Sequence* sequence, int num_blocks);
  // Takes the blocks of a runnable sequence away: it is computed again from its tokens. A token
  // that is pending is dropped; it will be drawn again, the same one, because a draw depends on
  // seed, position and tokens only.
  void Preempt(Sequence* sequence);
  // Gives a preempted sequence blocks for all its tokens and the next one; false: they are not
  // there.
  bool Resume(Sequence* sequence);
  // Makes the full blocks computed so far, and proven, known to the prefix cache, so that a next
  // turn of the conversation, or the sequence itself after a preemption, finds them.
  void CacheComputed(Sequence* sequence);
  // What launched steps compute for the sequence is not wanted, and its blocks go.
  void Release(Sequence* sequence);

 private:
  engine::BlockPool* const pool_;
  engine::PrefixCache* const cache_;
  worker::LaunchedSteps* const steps_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  absl::flat_hash_map<uint64_t, Sequence*> by_id_;
};

}  // namespace tandem::decode
