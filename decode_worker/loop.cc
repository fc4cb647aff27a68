#include "decode_worker/loop.h"

#include <algorithm>
#include <span>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/refusal.h"
#include "common/base/status.h"

namespace tandem::decode {
namespace {

// Half of slots and blocks is left to what is computed here.
RemotePrefillOptions WithBounds(RemotePrefillOptions options, const Limits& limits, int blocks) {
  options.window.prompts = std::max(1, limits.max_num_seqs / 2);
  options.window.blocks = blocks / 2;
  return options;
}

}  // namespace

Loop::Loop(LoopOptions options, LoopParts parts, worker::Reports reports)
    : options_(std::move(options)),
      parts_(parts),
      steps_(parts.runner, parts.pool, parts.clock),
      running_(parts.pool, parts.cache, &steps_),
      admission_(options_.admission, parts.pool, parts.cache, parts.clock),
      prefills_(WithBounds(options_.prefill, options_.admission.limits, parts.pool->counts().total),
                parts.receiver, parts.sender, parts.caller, parts.pool, parts.cache, parts.clock,
                parts.metrics),
      speculation_(options_.speculation, parts.metrics),
      publisher_(options_.publish, parts.waker, parts.metrics),
      reporter_(options_.report, std::move(reports), parts.pool, parts.cache,
                &parts.metrics->worker, parts.clock),
      meter_(options_.admission.limits.max_num_batched_tokens),
      pace_{absl::ToDoubleMilliseconds(options_.target_step), options_.row_tile, {}} {
  const AdmissionOptions& admission = options_.admission;
  const Limits& limits = admission.limits;
  TANDEM_CHECK(limits.max_num_batched_tokens >= limits.max_num_seqs,
               "a batch of {} tokens cannot hold a decode step of {} sequences",
               limits.max_num_batched_tokens, limits.max_num_seqs);
  TANDEM_CHECK(BlocksFor(admission.max_model_len, limits.block_size) <= parts_.pool->counts().total,
               "the pool does not hold one sequence of max_model_len {}", admission.max_model_len);
  TANDEM_CHECK(admission.unified || (parts_.receiver != nullptr && parts_.caller != nullptr),
               "a worker that is not unified needs a receiver and a caller");
}

Loop::~Loop() { EndAll(); }

void Loop::Run() {
  bool busy = true;
  while (!done()) busy = Step(busy ? absl::ZeroDuration() : IdleWait());
  EndAll();
}

bool Loop::Step(absl::Duration wait) {
  AdmitArrivals(wait);
  if (AwaitsTokens()) return CollectAndPublish(/*launched=*/false);
  speculation_.Propose(running_, pace_.cost);
  const Plan plan = NextBatch(running_.MakeView(), options_.admission.limits,
                              pace_.target_ms > 0 ? &pace_ : nullptr);
  const bool launched = Launch(plan);
  return CollectAndPublish(launched) || launched || !plan.preempt.empty() || !plan.resume.empty();
}

// ---- admit ----

void Loop::AdmitArrivals(absl::Duration wait) {
  for (Event& event : parts_.inbox->Drain(wait)) {
    std::visit([this](auto& e) { Handle(std::move(e)); }, event);
    reporter_.NoteChange();
  }
  CheckTimers();
  running_.Sweep();
  StartBacklog();
  publisher_.Flush();  // a first token does not wait for the step that comes now
}

void Loop::CheckTimers() {
  const absl::Time now = parts_.clock->Now();
  const auto expired = [now](const Work& work) { return now >= work.deadline; };
  for (WorkArrived& late : backlog_.TakeIf(expired)) {
    publisher_.Refuse(std::move(late.stream),
                      DeadlineExceeded("deadline passed before the prompt was asked for"));
    reporter_.NoteChange();
  }
  for (const auto& owned : running_.sequences()) {
    Sequence* s = owned.get();
    if (s->closed) continue;
    if (now >= s->work.deadline) {
      Close(s, DeadlineExceeded("deadline passed after {} generated tokens", s->generated()));
    } else if (absl::Status slow = publisher_.CheckReader(s, now); !slow.ok()) {
      Close(s, slow);
    } else if (prefills_.SealIsLate(s)) {
      prefills_.Lose(s, DeadlineExceeded("the KV blocks were not complete, and none came for {} s",
                                         absl::ToDoubleSeconds(options_.prefill.kv_seal_timeout)));
      reporter_.NoteChange();
    }
  }
}

void Loop::Handle(WorkArrived event) {
  const std::shared_ptr<TokenStream> stream = event.stream;
  const absl::Status status = Admit(&event);
  if (!status.ok()) publisher_.Refuse(stream, status);
}

absl::Status Loop::Admit(WorkArrived* event) {
  if (draining_) {
    return WithRefusal(Unavailable("worker {} is draining", options_.admission.worker_id),
                       {.reason = Refusal::Reason::kLeaving});
  }
  const absl::Time now = parts_.clock->Now();
  if (now >= event->work.deadline) {
    return DeadlineExceeded("deadline passed before the request was admitted");
  }
  const Placement place = admission_.Place(event->work);
  TANDEM_RETURN_IF_ERROR(admission_.CheckRoom(
      running_.MakeView(), place, place.ask ? backlog_.promised() : backlog_.HeldBack(now)));
  const bool waits = place.ask && (!backlog_.empty() || !prefills_.MayAsk(event->work, place.tokens,
                                                                          place.needed_blocks));
  if (!waits) return Start(std::move(*event), place);
  backlog_.Insert(std::move(*event), place);
  return absl::OkStatus();
}

void Loop::StartBacklog() {
  for (auto it = backlog_.waiting().begin(); it != backlog_.waiting().end();) {
    const auto waiting = it++;
    const Work& work = waiting->request.work;
    if (!prefills_.MayAsk(work, waiting->place.tokens, waiting->place.needed_blocks)) continue;
    const Placement place = admission_.Place(work);  // the cache has changed
    if (!admission_.CheckRoom(running_.MakeView(), place, {}).ok()) {
      waiting->lacks_room = std::min(waiting->lacks_room, parts_.clock->Now());
      return;  // nobody takes the room that becomes free from the first who waits for it
    }
    WorkArrived request = backlog_.Take(waiting);
    const std::shared_ptr<TokenStream> stream = request.stream;
    const absl::Status status = Start(std::move(request), place);
    if (!status.ok()) publisher_.Refuse(stream, status);
    reporter_.NoteChange();
  }
}

absl::Status Loop::Start(WorkArrived event, const Placement& place) {
  TANDEM_ASSIGN_OR_RETURN(Admitted admitted, admission_.Admit(std::move(event.work), place));
  Sequence* s = admitted.sequence.get();
  s->stream = std::move(event.stream);
  s->trace = RequestTrace::Begin(parts_.spans, s->work.trace, "decode.request", s->work.arrived);
  if (s->trace != nullptr) s->trace->Add("queue", s->work.arrived, s->reserved_at);
  if (admitted.ask) {
    TANDEM_RETURN_IF_ERROR(prefills_.Begin(s, std::move(admitted.fresh), s->reserved_at));
  } else {
    s->lease.Append(std::move(admitted.fresh));
    s->timing.transport = "local";
    s->timing.prefill_worker = options_.admission.worker_id;
    publisher_.EmitProgress(*s);
  }
  running_.Insert(std::move(admitted.sequence));
  return absl::OkStatus();
}

void Loop::Handle(WorkCancelled event) {
  Sequence* s = running_.Find(event.id);
  if (s != nullptr) {
    return Close(s, Cancelled("cancelled after {} generated tokens", s->generated()));
  }
  const auto cancelled = [&](const Work& work) { return work.id == event.id; };
  for (WorkArrived& request : backlog_.TakeIf(cancelled)) {
    publisher_.Refuse(std::move(request.stream),
                      Cancelled("cancelled before the prompt was asked for"));
  }
}

void Loop::Handle(PrefillReply event) {
  Sequence* s = prefills_.OnReply(event);
  if (s == nullptr) return;
  if (!event.outcome.ok()) {
    const absl::Status status = prefills_.Retry(s, event.outcome.status(), event.reached);
    if (!status.ok()) Close(s, status);
    return;
  }
  TokenLogprob first_token = std::move(event.outcome->first_token);
  prefills_.TakeOutcome(s, *std::move(event.outcome));
  // Its KV may still be on the way: the token need not wait for it, and mostly is out by now.
  if (publisher_.Emit(s, std::move(first_token), s->attempt->replied_at, event.sent)) {
    return Close(s, absl::OkStatus());
  }
  if (!s->attempt->kv_failure.ok()) return prefills_.Lose(s, s->attempt->kv_failure);
  RunIfComplete(s);
}

void Loop::Handle(BlocksWanted event) { prefills_.OnWanted(std::move(event)); }

void Loop::Handle(KvGiven event) { prefills_.OnGiven(event); }

void Loop::Handle(KvSealed event) {
  Sequence* s = prefills_.OnSealed(event.id, event.epoch, event.stats);
  if (s != nullptr) RunIfComplete(s);
}

void Loop::RunIfComplete(Sequence* s) {
  if (!s->attempt->replied || !s->attempt->sealed) return;
  prefills_.Complete(s);
  running_.CacheComputed(s);
}

void Loop::Handle(KvFailed event) {
  Sequence* s = prefills_.OnFailed(event.id, event.epoch, event.status);
  if (s == nullptr) return;
  if (s->attempt->replied) return prefills_.Lose(s, event.status);
  const absl::Status status = prefills_.Retry(s, event.status);
  if (!status.ok()) Close(s, status);
}

void Loop::Handle(KvQuiet event) { prefills_.OnQuiet(event.id, event.epoch); }

void Loop::Handle(worker::SnapshotWanted) { reporter_.ReportSnapshot(); }

void Loop::Handle(worker::DrainWanted) { draining_ = true; }

void Loop::Handle(worker::StopWanted) { stop_ = true; }

// ---- launch ----

bool Loop::Launch(const Plan& plan) {
  for (int i : plan.preempt) {
    Sequence* s = running_.at(i);
    running_.Preempt(s);
    ++s->timing.preemptions;
    s->preempted_at = std::min(s->preempted_at, parts_.clock->Now());
    parts_.metrics->worker.preemptions.Increment();
    reporter_.NoteChange();
  }
  engine::Batch batch;
  std::vector<worker::LaunchedRun> runs;
  for (const ScheduledRun& run : plan.runs) AddItem(run, &batch, &runs);
  for (int i : plan.resume) {
    if (!running_.Resume(running_.at(i))) break;
    reporter_.NoteChange();
  }
  if (batch.items.empty()) return false;
  const absl::StatusOr<engine::LaunchedStep> launched = steps_.Launch(batch, runs);
  if (!launched.ok()) {
    spdlog::error("a batch of {} sequences was refused: {}", runs.size(),
                  launched.status().ToString());
    for (const worker::LaunchedRun& run : runs) {
      FailSequence(running_.Find(run.sequence), launched.status());
    }
    return false;
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    Sequence* s = running_.Find(runs[i].sequence);
    s->launched = runs[i].start + runs[i].num_tokens - runs[i].drafted;
    s->pending = runs[i].draws ? engine::DrawnToken{launched->id, static_cast<int>(i)}
                               : engine::DrawnToken{};
  }
  return true;
}

bool Loop::AwaitsTokens() const {
  return !steps_.empty() &&
         (steps_.drafted() || speculation_.WantsTokens(running_, pace_.cost, steps_.host_time()));
}

void Loop::AddItem(const ScheduledRun& run, engine::Batch* batch,
                   std::vector<worker::LaunchedRun>* runs) {
  Sequence* s = running_.at(run.sequence);
  // Blocks that a preemption should have freed were shared: the next plan preempts one more.
  if (!running_.Grow(s, run.new_blocks)) return;
  engine::BatchItem& item = batch->items.emplace_back();
  item.tokens = s->tokens;
  item.pending = s->pending;
  item.start = s->launched;
  item.num_tokens = run.num_tokens;
  if (run.drafted > 0) {
    item.draft = std::span(s->speculated->draft.tokens).first(static_cast<size_t>(run.drafted));
  }
  item.prompt_length = s->prompt_length;
  item.block_table = s->lease.blocks();
  const bool draws = item.start + item.num_tokens == item.length();
  item.sampling = draws ? &s->work.sampling : nullptr;
  if (item.start < s->prompt_length && s->generated() == 0) {
    item.prompt_logprobs = s->work.sampling.prompt_logprobs;
  }
  s->prefill_started_at = std::min(s->prefill_started_at, parts_.clock->Now());
  runs->push_back({s->work.id, item.start, item.num_tokens, draws, run.drafted});
}

// ---- collect and publish ----

// False if nothing was in flight.
bool Loop::CollectAndPublish(bool launched) {
  // Right after a launch the device may be given one step more before the host waits for one.
  const bool collect = !steps_.empty() && (steps_.full() || !launched);
  if (collect) Publish(steps_.Collect());
  EndTurn();
  return collect;
}

void Loop::Publish(const worker::CollectedStep& step) {
  if (!step.output.ok()) {
    spdlog::error("a batch of {} sequences failed: {}", step.runs.size(),
                  step.output.status().ToString());
    for (const worker::LaunchedRun& run : step.runs) {
      if (Sequence* s = running_.Find(run.sequence)) FailSequence(s, step.output.status());
    }
    return;
  }
  const absl::Time now = parts_.clock->Now();
  StepWork work;
  for (size_t i = 0; i < step.runs.size(); ++i) {
    const worker::LaunchedRun& run = step.runs[i];
    if (run.drafted > 0) {
      work.AddRows(run.start, run.num_tokens);
    } else {
      work.Add(run.start, run.num_tokens);
    }
    PublishItem(run, step.output->items[i], now);
  }
  WorkerMetrics& metrics = parts_.metrics->worker;
  metrics.step_seconds.Observe(absl::ToDoubleSeconds(step.took));
  metrics.batch_tokens.Observe(work.decode_steps + work.chunk_tokens);
  metrics.batch_sequences.Observe(static_cast<double>(step.runs.size()));
  meter_.AddStep(work.decode_steps, work.chunk_tokens, step.took);
  pace_.cost.Observe(work, step.took);
}

void Loop::PublishItem(const worker::LaunchedRun& run, const engine::ItemOutput& output,
                       absl::Time now) {
  // Null where the sequence ended, or lost its blocks, after the launch: the surplus is dropped.
  Sequence* s = running_.Find(run.sequence);
  if (s == nullptr) return;
  if (!output.status.ok()) return FailSequence(s, output.status);
  s->computed = run.start + run.num_tokens - run.drafted;
  if (run.draws) s->proven = s->computed;
  if (run.start < s->prompt_length) {
    parts_.metrics->worker.prompt_tokens.Increment(run.num_tokens);
    s->prompt_logprobs.insert(s->prompt_logprobs.end(), output.prompt_logprobs.begin(),
                              output.prompt_logprobs.end());
    if (s->computed >= s->prompt_length) running_.CacheComputed(s);
  }
  if (!run.draws) return publisher_.EmitProgress(*s);
  TANDEM_CHECK(output.has_token, "the runner drew no token");
  // A later launched step has a token of its own pending by now, unless this was the last one.
  if (s->launched == s->computed) s->pending = {};
  if (s->drawn() == 0) {  // a local prefill is done
    s->timing.stages[Stage::kPrefillQueue] =
        absl::ToDoubleMilliseconds(s->prefill_started_at - s->reserved_at);
    s->timing.stages[Stage::kPrefill] = absl::ToDoubleMilliseconds(now - s->prefill_started_at);
    s->runnable_at = now;
    if (s->trace != nullptr) {
      s->trace->Add("prefill_queue", s->reserved_at, s->prefill_started_at);
      s->trace->Add("prefill", s->prefill_started_at, now);
    }
  }
  PublishTokens(s, run, output, now);
}

void Loop::PublishTokens(Sequence* s, const worker::LaunchedRun& run,
                         const engine::ItemOutput& output, absl::Time now) {
  if (run.drafted > 0) {
    speculation_.OnVerified(s, run.drafted, static_cast<int>(output.further.size()));
  }
  // A first token from elsewhere was counted where it was drawn.
  parts_.metrics->worker.generation_tokens.Increment();
  if (publisher_.Emit(s, output.token, now)) return Close(s, absl::OkStatus());
  for (const TokenLogprob& token : output.further) {
    // What was drawn last was the draft's token: the step has computed it.
    s->computed = s->launched = s->proven = s->computed + 1;
    parts_.metrics->worker.generation_tokens.Increment();
    if (publisher_.Emit(s, token, now)) return Close(s, absl::OkStatus());
  }
}

void Loop::FailSequence(Sequence* s, const absl::Status& status) {
  s->computed = 0;  // nothing of what the step wrote may be found again
  Close(s, Internal("the forward pass failed: {}", MessageOf(status)));
}

void Loop::Close(Sequence* s, const absl::Status& status) {
  TANDEM_CHECK(!s->closed, "a sequence ends once");
  prefills_.Abandon(s);
  running_.CacheComputed(s);
  running_.Release(s);
  s->closed = true;
  publisher_.End(*s, status, parts_.clock->Now());
  reporter_.NoteChange();
}

void Loop::EndTurn() {
  running_.Sweep();
  // Before its last token wakes the reader: whoever answers it at once finds its blocks in the
  // router's index.
  reporter_.Report([this] { return MakeLoad(); });
  publisher_.Flush();
}

LoadReport Loop::MakeLoad() const {
  LoadReport load;
  for (const auto& s : running_.sequences()) {
    ++(s->phase == SequencePhase::kRunnable ? load.running : load.waiting);
    if (s->phase != SequencePhase::kAwaitingPrefill && s->length() - s->launched > 1) {
      load.waiting_tokens += s->length() - s->launched;
    }
  }
  load.waiting += backlog_.size();
  load.prefill_failures = prefills_.Failures();
  load.links = prefills_.Links();
  parts_.metrics->worker.ShowLinks(options_.admission.worker_id, load.links);
  load.prefill_backlog = backlog_.Tokens();
  const Promised held = backlog_.HeldBack(parts_.clock->Now());
  load.admits_blocks = draining_ ? 0 : admission_.AdmissibleBlocks(running_.MakeView(), held);
  load.promised_blocks = backlog_.promised().blocks - held.blocks;
  load.promised_sequences = backlog_.size();
  load.prefill_tokens_per_second = meter_.prefill_rate().TokensPerSecond();
  load.prefill_fit_tokens = meter_.prefill_rate().Tokens();
  load.saturated_tokens_per_second = meter_.saturated_rate().TokensPerSecond();
  load.decode_step_milliseconds = meter_.DecodeStepMilliseconds();
  return load;
}

// Idempotent.
void Loop::EndAll() {
  parts_.inbox->Close();
  draining_ = true;  // what arrived and was not looked at is refused
  AdmitArrivals(absl::ZeroDuration());
  for (const auto& s : running_.sequences()) {
    Close(s.get(),
          WithRefusal(Unavailable("the worker stops"), {.reason = Refusal::Reason::kLeaving}));
  }
  for (WorkArrived& request : backlog_.TakeIf([](const Work&) { return true; })) {
    publisher_.Refuse(
        std::move(request.stream),
        WithRefusal(Unavailable("the worker stops"), {.reason = Refusal::Reason::kLeaving}));
  }
  running_.Sweep();
  publisher_.Flush();
}

}  // namespace tandem::decode
