// The steps that a loop has launched and not collected yet: what each computes, for whom, and which
// blocks must not be used again before it is over.
//
// Not thread-safe: part of a worker's loop, which owns the runner.
//
// A sequence may end, or lose its blocks to another one, while a launched step still computes it.
// What the step draws for it is then dropped. The blocks that the step writes go to the pool's
// quarantine until it is over: the device works in the order of launching, but a remote sender, who
// fills blocks too, does not wait for the device. Shared blocks are only read, and what was read
// for a dropped output harms nobody, so they are free to go at once.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "engine/kv/block_pool.h"
#include "engine/runtime/batch.h"
#include "engine/runtime/model_runner.h"

namespace tandem::worker {

// One item of a launched batch.
struct LaunchedRun {
  uint64_t sequence = 0;  // the loop's name for it, never 0; 0: nobody wants this output any more
  int start = 0;          // first position that is computed
  int num_tokens = 0;
  bool draws = false;  // a token
  int drafted = 0;     // of num_tokens, the last: a draft's (engine::BatchItem::draft)
};

struct CollectedStep {
  std::vector<LaunchedRun> runs;  // one per item of the batch
  // Not OK: nothing of the batch may be used. Items have a status of their own as well.
  absl::StatusOr<engine::StepOutput> output;
  absl::Duration took;  // since the later of its launch and the end of the step before it

  int NumTokens() const;
};

class LaunchedSteps {
 public:
  // All outlive this.
  LaunchedSteps(engine::ModelRunner* runner, engine::BlockPool* pool, Clock* clock);
  // Waits for what still runs, whose output is dropped.
  ~LaunchedSteps();

  bool empty() const { return steps_.empty(); }
  // One launch more, and the oldest step must be collected first.
  bool full() const { return static_cast<int>(steps_.size()) >= runner_->max_in_flight(); }
  // Whether a step in flight computes a draft: how long its sequences are then, nobody knows yet.
  bool drafted() const;

  // `runs[i]` tells about `batch.items[i]`. The batch's inputs may change as soon as this returns.
  // On error nothing was launched.
  absl::StatusOr<engine::LaunchedStep> Launch(const engine::Batch& batch,
                                              std::vector<LaunchedRun> runs);
  // Waits for the oldest step and ends the quarantine of the blocks that it touched last.
  CollectedStep Collect();

  // Whether a launched step computes `sequence`, and so reads and writes its blocks.
  bool Contains(uint64_t sequence) const;
  // The outputs of `sequence` are not wanted any more. `lease`, its blocks, is released; what
  // launched steps write of it waits for the newest of them.
  void Drop(uint64_t sequence, engine::BlockLease lease);
  // Blocks in quarantine for a step: they come back with the next Collect()s.
  int num_returning_blocks() const { return num_returning_blocks_; }
  // What passes, about, from the collection of a step to the next launch: the device is idle for so
  // long where no step is launched ahead. 0: not known yet.
  absl::Duration host_time() const { return host_time_; }

 private:
  struct Step {
    engine::StepId id = 0;
    std::vector<LaunchedRun> runs;
    absl::Time launched;
    std::vector<uint64_t> tickets;  // of the quarantine
    int quarantined = 0;            // blocks under these tickets
  };

  engine::ModelRunner* const runner_;
  engine::BlockPool* const pool_;
  Clock* const clock_;
  std::deque<Step> steps_;  // oldest first
  absl::Time last_collected_ = absl::InfinitePast();
  bool launched_since_ = true;
  absl::Duration host_time_;
  int num_returning_blocks_ = 0;
};

}  // namespace tandem::worker
