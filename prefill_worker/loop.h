// The prefill worker's owner thread: prompts in, KV blocks to a decode worker and a first token
// out.
//
// A prompt waits until the pool has its blocks, runs chunk by chunk, and is replied to when its
// first token is sampled. Its blocks stay leased until the sender is done with them, also after a
// cancellation, and until the last launched step that computes it is over. Blocks that the prefix
// cache holds already are shipped at once; every other one after each layer of the chunk that
// completes it.
//
// A chunk's blocks are shared as soon as it is computed, before the last chunk has shown that the
// numbers are sound. Where it shows that they are not, they are taken out of the prefix cache
// again, and the prompts that took them over fail too: their callers ask elsewhere. What was sound
// then is watched by a digest (PrefixCache::KeepDigests).
//
// One turn is four lines, as in the decode loop: admit, plan, launch, and collect and publish the
// oldest step in flight. Where the runner takes two steps, the next chunk of a prompt is launched
// before the one before it is collected.
//
// Blocks of a prompt that its caller holds and the prefix cache here lacks may be fetched before it
// is computed (Returns). Once they have come, they are cached like computed ones.
//
// A prompt past its deadline is dropped wherever it stands; its caller's cancellation, which says
// the same, may be late or lost.
//
// Threads: Run() (or, in tests, Step()) belongs to one thread, which owns pool, cache, runner and
// all sequences. Every other thread speaks to the loop through its inbox and hears from it through
// Work::reply and worker::Reports. No clock but the one given, no gRPC.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/base/kv_layout.h"
#include "common/base/load_report.h"
#include "common/base/rate_meter.h"
#include "common/base/trace.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "engine/runtime/model_runner.h"
#include "prefill_worker/event.h"
#include "prefill_worker/prefill_metrics.h"
#include "prefill_worker/returns.h"
#include "prefill_worker/sequence.h"
#include "prefill_worker/shipper.h"
#include "prefill_worker/waiting_prompts.h"
#include "worker/launched_steps.h"
#include "worker/prompt_batch.h"
#include "worker/reporter.h"

namespace tandem::prefill {

struct LoopOptions {
  worker::PromptLimits limits;
  KvLayout layout;
  int max_waiting = 1024;  // prompts waiting for blocks; more are refused
  ReturnOptions returns;
  worker::ReporterOptions report;
  std::string worker_id;
  std::string cluster_secret;  // with model_digest and a request's salt: the block hash seed
  std::string model_digest;
};

// All outlive the loop. `receiver` null: no blocks are asked back from callers; `spans` null:
// nothing is traced.
struct LoopParts {
  engine::ModelRunner* runner = nullptr;
  engine::BlockPool* pool = nullptr;
  engine::PrefixCache* cache = nullptr;
  kvtransfer::KvSender* sender = nullptr;
  kvtransfer::KvReceiver* receiver = nullptr;
  Clock* clock = nullptr;
  PrefillMetrics* metrics = nullptr;
  EventInbox* inbox = nullptr;
  SpanSink* spans = nullptr;
};

class Loop {
 public:
  Loop(LoopOptions options, LoopParts parts, worker::Reports reports);
  // Ends what is left with UNAVAILABLE; leased blocks go back, so the sender must read no more.
  ~Loop();

  // Until StopWanted, or until nothing is left after DrainWanted. Then the inbox is closed and
  // nobody waits for a reply.
  void Run();
  // One turn; waits up to `wait` for something to come in. False if there was nothing to compute.
  bool Step(absl::Duration wait);
  // How long the next Step may wait where this one had nothing to compute.
  absl::Duration IdleWait() const { return reporter_.IdleWait(); }
  bool done() const { return stop_ || (draining_ && sequences_.empty() && steps_.empty()); }

  // Of now, without the blocks by state.
  LoadReport Load() const;
  // Blocks on their way back that may still be written.
  size_t num_returns() const { return returns_.num_transfers(); }

 private:
  // Admit.
  void AdmitArrivals(absl::Duration wait);
  void Handle(WorkArrived event);
  void Handle(WorkCancelled event);
  void Handle(KvSealed event);
  void Handle(KvFailed event);
  void Handle(KvQuiet event);
  void Handle(KvShipped event);
  void Handle(worker::SnapshotWanted event);
  void Handle(worker::DrainWanted event);
  void Handle(worker::StopWanted event);
  // Ends what is past its deadline: before it is computed, between its chunks, while it is shipped.
  void DropLate();
  absl::Status Accept(const Work& work) const;
  void AdmitWaiting();
  absl::Status Admit(Sequence* sequence);
  // With the first `cached_blocks` of its lease filled. On error it holds none.
  absl::Status Start(Sequence* sequence, int cached_blocks);
  // Its blocks do not come back: it waits again, to be computed without them.
  void GiveUpReturn(Sequence* sequence, ReturnResult why);
  // Before its first chunk: takes over blocks that others computed since it was admitted.
  void ShareNewlyCached(Sequence* sequence);

  // Plan and launch.
  std::vector<worker::PromptView> MakeView();
  bool Launch(const std::vector<worker::PromptChunk>& chunks);

  // Collect and publish.
  bool CollectAndPublish(bool launched);
  void Publish(worker::CollectedStep step);
  void PublishChunk(Sequence* sequence, const worker::LaunchedRun& run, engine::ItemOutput output);
  void Finish(Sequence* sequence, TokenLogprob first_token);
  // Of a collected step: nothing that it computed may be found again, or serve those who found it.
  void FailComputed(Sequence* sequence, const absl::Status& status);
  absl::Status ForwardPassFailed(const absl::Status& why) const;
  void NoteDamagedBlocks();

  // The open prompt with this Work::id; null: it was replied to.
  Sequence* Find(uint64_t id) const;
  // The prompt has been replied to so.
  void EndTrace(Sequence* sequence, absl::Time now, absl::StatusCode code);
  // Ends a prompt that was not replied to.
  void Fail(Sequence* sequence, const absl::Status& status);
  void Forget(Sequence* sequence);
  void EndAll();

  const LoopOptions options_;
  const LoopParts parts_;

  worker::LaunchedSteps steps_;
  Shipper shipper_;
  Returns returns_;
  worker::Reporter reporter_;
  absl::flat_hash_map<TransferKey, std::unique_ptr<Sequence>> sequences_;
  absl::flat_hash_map<uint64_t, Sequence*> by_work_id_;  // not yet replied to
  WaitingPrompts waiting_;
  std::vector<Sequence*> running_;  // in order of admission
  std::vector<Sequence*> in_view_;  // of the plan being made
  RateMeter rate_;
  SaturatedRate saturated_;
  uint64_t damaged_blocks_seen_ = 0;
  bool draining_ = false;
  bool stop_ = false;
};

}  // namespace tandem::prefill
