// The decode worker's owner thread: continuous batching over paged KV.
//
// Threads: Run() (or, in tests, Step()) belongs to one thread, which owns pool, cache, runner and
// all sequences. Every other thread speaks to the loop through its inbox and hears from it through
// TokenStream and LoopHooks. No clock but the one given, no gRPC.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "decode_worker/decode_metrics.h"
#include "decode_worker/load_meter.h"
#include "decode_worker/loop_event.h"
#include "decode_worker/remote_prefill.h"
#include "decode_worker/scheduler.h"
#include "decode_worker/sequence.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "engine/runtime/model_runner.h"

namespace tandem::decode {

struct LoopOptions {
  SchedulerLimits limits;
  int max_model_len = 0;              // tokens; the pool holds at least one sequence of this length
  bool unified = false;               // prefill everything here
  int local_prefill_max_tokens = 32;  // uncached tokens up to which a prompt is prefilled here
  absl::Duration kv_seal_timeout = absl::Seconds(10);  // from the first token to the last block
  absl::Duration prefill_timeout = absl::Minutes(10);  // of one Prefill call
  size_t max_pending_tokens = 4096;                // a reader further behind pauses its sequence
  absl::Duration pause_limit = absl::Seconds(60);  // a longer pause ends it
  absl::Duration report_interval = absl::Milliseconds(200);
  std::string kv_transport = "tcp";
  std::string worker_id;
  std::string cluster_secret;  // with model_digest and a request's salt: the block hash seed
  std::string model_digest;
};

// What the loop tells the cluster. Called on the loop's thread; must not block. Either may be
// empty.
struct LoopHooks {
  std::function<void(const LoadSnapshot&)> report;  // every report_interval and on changes
  std::function<void(const engine::BlockEvents&, bool cleared)> blocks;
};

// All outlive the loop. `receiver` and `caller` may be null where `unified`.
struct LoopParts {
  engine::ModelRunner* runner = nullptr;
  engine::BlockPool* pool = nullptr;
  engine::PrefixCache* cache = nullptr;
  kvtransfer::KvReceiver* receiver = nullptr;
  PrefillCaller* caller = nullptr;
  Clock* clock = nullptr;
  DecodeMetrics* metrics = nullptr;
  DecodeInbox* inbox = nullptr;
};

class DecodeLoop {
 public:
  DecodeLoop(LoopOptions options, LoopParts parts, LoopHooks hooks);
  // Ends what is left with UNAVAILABLE.
  ~DecodeLoop();

  // Until StopWanted, or until nothing is left after DrainWanted. The inbox is closed then.
  void Run();
  // One turn: takes the inbox (waiting up to `wait` for it to fill), computes one batch, publishes.
  // False if there was nothing to compute.
  bool Step(absl::Duration wait);
  bool done() const { return stop_ || (draining_ && sequences_.empty()); }

  size_t num_sequences() const { return sequences_.size(); }
  size_t num_transfers() const { return prefills_.num_transfers(); }

 private:
  // loop.cc: the turn
  void AdmitArrivals(absl::Duration wait);
  engine::Batch Prepare(const Plan& plan);
  void Publish(const engine::Batch& batch, const engine::StepOutput& out, absl::Time started);
  void FailBatch(const absl::Status& status);
  void FailSequence(Sequence* sequence, const absl::Status& status);  // of the batch just run
  void Preempt(Sequence* sequence);
  bool Resume(Sequence* sequence);
  void CheckTimers();
  void Sweep();
  void Report();
  SchedulerView View() const;

  // loop_admission.cc: work comes in, prompts become runnable
  void Handle(WorkArrived event);
  absl::Status Validate(const DecodeWork& work) const;
  absl::Status Admit(WorkArrived* event);
  absl::Status StartPrefill(Sequence* sequence, engine::BlockLease fresh);
  void Handle(WorkCancelled event);
  void Handle(PrefillReply event);
  void Handle(KvSealed event);
  void Handle(KvFailed event);
  void Handle(KvQuiet event);
  void Handle(SnapshotWanted event);
  void Handle(DrainWanted event);
  void Handle(StopWanted event);
  void RetryPrefill(Sequence* sequence, const absl::Status& why);
  void LoseKv(Sequence* sequence, const absl::Status& why);
  void CountKvFailure(const Sequence& sequence);  // of its current attempt
  void MakeRunnable(Sequence* sequence);

  // loop_publish.cc: tokens go out, sequences end
  void Emit(Sequence* sequence, engine::TokenLogprob token, absl::Time now);
  FinishReason EndAfter(const Sequence& sequence, int32_t token) const;
  void Close(Sequence* sequence, const absl::Status& status);
  void CacheComputed(Sequence* sequence);
  void Observe(const Sequence& sequence, absl::Time now);

  const LoopOptions options_;
  const LoopParts parts_;
  const LoopHooks hooks_;

  RemotePrefills prefills_;
  std::vector<std::unique_ptr<Sequence>> sequences_;  // scheduled first to last, see scheduler.h
  std::vector<Sequence*> batch_sequences_;            // of the batch being run, item by item
  LoadMeter meter_;
  absl::Time last_report_ = absl::InfinitePast();
  bool changed_ = true;  // since the last report
  bool draining_ = false;
  bool stop_ = false;
};

}  // namespace tandem::decode
