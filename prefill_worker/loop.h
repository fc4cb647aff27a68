// The prefill worker's owner thread: prompts in, KV blocks to a decode worker and a first token
// out.
//
// A prompt waits until the pool has its blocks, runs chunk by chunk, and is replied to when its
// first token is sampled. Its blocks stay leased until the sender is done with them, also after a
// cancellation. Blocks that the prefix cache holds already are shipped at once; every other one
// after each layer of the chunk that completes it.
//
// Threads: Run() (or, in tests, Step()) belongs to one thread, which owns pool, cache, runner and
// all sequences. Every other thread speaks to the loop through its inbox and hears from it through
// PrefillWork::reply and PrefillLoopHooks. No clock but the one given, no gRPC.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/base/kv_layout.h"
#include "common/base/rate_meter.h"
#include "common/metrics/worker_metrics.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "engine/runtime/model_runner.h"
#include "prefill_worker/prefill_work.h"
#include "prefill_worker/scheduler.h"

namespace tandem::prefill {

struct PrefillLoopOptions {
  PrefillLimits limits;
  KvLayout layout;
  int max_waiting = 1024;  // prompts waiting for blocks; more are refused
  absl::Duration report_interval = absl::Milliseconds(200);
  absl::Duration min_report_interval = absl::Milliseconds(20);  // where something changed
  std::string worker_id;
  std::string cluster_secret;  // with model_digest and a request's salt: the block hash seed
  std::string model_digest;
};

struct PrefillLoad {
  int running = 0;             // hold blocks: being computed or shipped
  int waiting = 0;             // for blocks
  int64_t waiting_tokens = 0;  // queued or running, not yet computed
  engine::BlockPoolCounts blocks;
  double tokens_per_second = 0;  // 0: not known yet
};

// What the loop tells the cluster. Called on the loop's thread; must not block. Either may be
// empty.
struct PrefillLoopHooks {
  std::function<void(const PrefillLoad&)> report;
  std::function<void(const engine::BlockEvents&, bool cleared)> blocks;
};

// All outlive the loop.
struct PrefillLoopParts {
  engine::ModelRunner* runner = nullptr;
  engine::BlockPool* pool = nullptr;
  engine::PrefixCache* cache = nullptr;
  kvtransfer::KvSender* sender = nullptr;
  Clock* clock = nullptr;
  WorkerMetrics* metrics = nullptr;
  PrefillInbox* inbox = nullptr;
};

class PrefillLoop {
 public:
  PrefillLoop(PrefillLoopOptions options, PrefillLoopParts parts, PrefillLoopHooks hooks);
  // Ends what is left with UNAVAILABLE; leased blocks go back, so the sender must read no more.
  ~PrefillLoop();

  // Until PrefillStopWanted, or until nothing is left after PrefillDrainWanted. Then the inbox is
  // closed and nobody waits for a reply.
  void Run();
  // One turn: takes the inbox (waiting up to `wait` for it to fill), computes one batch, publishes.
  // False if there was nothing to compute.
  bool Step(absl::Duration wait);
  bool done() const { return stop_ || (draining_ && sequences_.empty()); }

  PrefillLoad Load() const;

 private:
  using TransferKey = std::pair<TransferId, uint64_t>;  // id, epoch

  enum class Phase {
    kWaiting,   // holds no blocks
    kRunning,   // prompt is computed chunk by chunk
    kShipping,  // replied; the sender still reads the blocks
  };

  struct Sequence {
    PrefillWork work;
    Hash128 seed;
    Phase phase = Phase::kWaiting;
    int times_passed = 0;
    engine::BlockLease lease;
    int cached = 0;                             // tokens
    int computed = 0;                           // tokens, cached ones included
    int pushed_blocks = 0;                      // all layers are with the sender
    int inserted_blocks = 0;                    // known to the prefix cache
    absl::Time started = absl::InfinitePast();  // first chunk
    std::vector<engine::TokenLogprob> prompt_logprobs;

    int length() const { return static_cast<int>(work.tokens.size()); }
    TransferKey key() const { return {work.target.id, work.target.epoch}; }
  };

  // Blocks that one item of the running batch completes, for the sender.
  struct Shipment {
    const Sequence* sequence = nullptr;
    std::vector<int32_t> blocks;
    std::vector<int32_t> ordinals;
  };

  // loop.cc: the turn
  void Close();
  void AdmitArrivals(absl::Duration wait);
  std::vector<PromptChunk> NextBatch();
  engine::Batch Prepare(const std::vector<PromptChunk>& chunks);
  void Publish(const std::vector<PromptChunk>& chunks, engine::StepOutput out);
  void Finish(Sequence* sequence, engine::TokenLogprob first_token);
  void Fail(Sequence* sequence, const absl::Status& status);
  void FailBatch(const std::vector<PromptChunk>& chunks, const absl::Status& status);
  void FailComputed(Sequence* sequence, const absl::Status& status);  // in the batch just run
  void Report();

  // loop_admission.cc: what comes in
  void Handle(PrefillArrived event);
  void Handle(PrefillCancelled event);
  void Handle(PrefillShipped event);
  void Handle(PrefillSnapshotWanted event);
  void Handle(PrefillDrainWanted event);
  void Handle(PrefillStopWanted event);
  absl::Status Accept(const PrefillWork& work) const;
  void AdmitWaiting();
  absl::Status Admit(Sequence* sequence);
  // Before its first chunk: takes over blocks that others computed since it was admitted.
  void ShareNewlyCached(Sequence* sequence);
  int MaxCachedBlocks(const Sequence& sequence) const;
  // Prompt blocks [from, to) are computed: all their layers go to the sender.
  void ShipCached(const Sequence& sequence, int from, int to);
  void Forget(const Sequence& sequence);

  int BlocksFor(int tokens) const {
    return (tokens + options_.layout.block_size - 1) / options_.layout.block_size;
  }

  const PrefillLoopOptions options_;
  const PrefillLoopParts parts_;
  const PrefillLoopHooks hooks_;

  absl::flat_hash_map<TransferKey, std::unique_ptr<Sequence>> sequences_;
  absl::flat_hash_map<uint64_t, Sequence*> by_work_id_;  // not yet replied to
  std::vector<Sequence*> waiting_;                       // in the order of their turn
  std::vector<Sequence*> running_;                       // in order of admission
  // Transfers that are over, so that a repeated request is known as such; oldest first.
  std::deque<TransferKey> past_order_;
  absl::flat_hash_set<TransferKey> past_;
  std::vector<Shipment> shipments_;  // of the batch being run
  RateMeter rate_;
  uint64_t query_tokens_seen_ = 0;  // of the cache's counters, already in the metrics
  uint64_t hit_tokens_seen_ = 0;
  absl::Time last_report_ = absl::InfinitePast();
  bool changed_ = true;  // since the last report
  bool draining_ = false;
  bool stop_ = false;
};

}  // namespace tandem::prefill
