// The decode worker's owner thread: continuous batching over paged KV.
//
// One turn is four lines: admit what came in, let the pure scheduler plan a batch, launch it, and
// collect and publish the oldest step in flight. Where the runner takes one step at a time that is
// the batch just launched. Where it takes two it is the one before, so that the host's work on step
// n hides behind the device's work on step n + 1. The end of a sequence is then seen one step late:
// what step n + 1 draws for it is dropped, and its blocks wait until step n + 1 is over. While
// drafts are computed or likely to pay, steps are taken one at a time there too (speculation.h).
//
// Threads: Run() (or, in tests, Step()) belongs to one thread, which owns pool, cache, runner and
// all sequences. Every other thread speaks to the loop through its inbox and hears from it through
// TokenStream and worker::Reports. No clock but the one given, no gRPC.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/base/trace.h"
#include "decode_worker/admission.h"
#include "decode_worker/decode_metrics.h"
#include "decode_worker/event.h"
#include "decode_worker/load_meter.h"
#include "decode_worker/prefill_backlog.h"
#include "decode_worker/publisher.h"
#include "decode_worker/remote_prefill.h"
#include "decode_worker/running_set.h"
#include "decode_worker/scheduler.h"
#include "decode_worker/speculation.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "engine/runtime/model_runner.h"
#include "worker/launched_steps.h"
#include "worker/reporter.h"

namespace tandem::decode {

struct LoopOptions {
  AdmissionOptions admission;  // limits, max_model_len, and where prompts are computed
  RemotePrefillOptions prefill;
  PublisherOptions publish;
  worker::ReporterOptions report;
  // A step's time that prompts' chunks are cut for while other sequences draw tokens; 0: they are
  // cut by the token budget alone.
  absl::Duration target_step;
  int row_tile = 1;  // see Pace
  SpeculationOptions speculation;
};

// All outlive the loop. `receiver` and `caller` may be null where `unified`; `sender` always: then
// prefill workers are given no blocks back; `waker` always: then readers are woken on the loop's
// thread; `spans` always: then nothing is traced.
struct LoopParts {
  engine::ModelRunner* runner = nullptr;
  engine::BlockPool* pool = nullptr;
  engine::PrefixCache* cache = nullptr;
  kvtransfer::KvReceiver* receiver = nullptr;
  kvtransfer::KvSender* sender = nullptr;
  PrefillCaller* caller = nullptr;
  StreamWaker* waker = nullptr;
  Clock* clock = nullptr;
  DecodeMetrics* metrics = nullptr;
  EventInbox* inbox = nullptr;
  SpanSink* spans = nullptr;
};

class Loop {
 public:
  Loop(LoopOptions options, LoopParts parts, worker::Reports reports);
  // Ends what is left with UNAVAILABLE.
  ~Loop();

  // Until StopWanted, or until nothing is left after DrainWanted. Then the inbox is closed, and
  // every stream has ended.
  void Run();
  // One turn; waits up to `wait` for something to come in. False if there was nothing to compute.
  bool Step(absl::Duration wait);
  // How long the next Step may wait where this one had nothing to compute.
  absl::Duration IdleWait() const { return reporter_.IdleWait(); }
  bool done() const {
    return stop_ || (draining_ && running_.empty() && backlog_.empty() && steps_.empty());
  }

  size_t num_sequences() const { return running_.size(); }
  int num_backlog() const { return backlog_.size(); }
  size_t num_transfers() const { return prefills_.num_transfers(); }

 private:
  // Admit.
  void AdmitArrivals(absl::Duration wait);
  void CheckTimers();
  void Handle(WorkArrived event);
  void Handle(WorkCancelled event);
  void Handle(PrefillReply event);
  void Handle(BlocksWanted event);
  void Handle(KvSealed event);
  void Handle(KvFailed event);
  void Handle(KvQuiet event);
  void Handle(KvGiven event);
  void Handle(worker::SnapshotWanted event);
  void Handle(worker::DrainWanted event);
  void Handle(worker::StopWanted event);
  // Starts the request, or lets it wait for its turn.
  absl::Status Admit(WorkArrived* event);
  absl::Status Start(WorkArrived event, const Placement& place);
  // Of those that wait for their turn.
  void StartBacklog();
  void RunIfComplete(Sequence* sequence);

  // Launch.
  // Whether the next step waits for what is in flight.
  bool AwaitsTokens() const;
  bool Launch(const Plan& plan);
  void AddItem(const ScheduledRun& run, engine::Batch* batch,
               std::vector<worker::LaunchedRun>* runs);

  // Collect and publish.
  bool CollectAndPublish(bool launched);
  void Publish(const worker::CollectedStep& step);
  void PublishItem(const worker::LaunchedRun& run, const engine::ItemOutput& output,
                   absl::Time now);
  // Every token of a run that draws; ends the sequence with its last.
  void PublishTokens(Sequence* sequence, const worker::LaunchedRun& run,
                     const engine::ItemOutput& output, absl::Time now);
  void FailSequence(Sequence* sequence, const absl::Status& status);  // of a collected step
  // Ends the stream and gives all blocks back (or into quarantine). The sequence itself stays until
  // the end of the turn.
  void Close(Sequence* sequence, const absl::Status& status);
  void EndTurn();
  LoadReport MakeLoad() const;

  void EndAll();

  const LoopOptions options_;
  const LoopParts parts_;

  worker::LaunchedSteps steps_;
  RunningSet running_;
  Admission admission_;
  RemotePrefills prefills_;
  PrefillBacklog backlog_;
  Speculation speculation_;
  Publisher publisher_;
  worker::Reporter reporter_;
  LoadMeter meter_;
  Pace pace_;
  bool draining_ = false;
  bool stop_ = false;
};

}  // namespace tandem::decode
