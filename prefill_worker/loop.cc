#include "prefill_worker/loop.h"

#include <algorithm>
#include <iterator>
#include <span>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::prefill {

Loop::Loop(LoopOptions options, LoopParts parts, worker::Reports reports)
    : options_(std::move(options)),
      parts_(parts),
      steps_(parts.runner, parts.pool, parts.clock),
      shipper_(parts.sender, options_.layout),
      returns_(options_.returns, parts.receiver, parts.pool, parts.clock, parts.metrics),
      reporter_(options_.report, std::move(reports), parts.pool, parts.cache,
                &parts.metrics->worker, parts.clock) {
  parts_.cache->KeepDigests(
      [sender = parts_.sender](std::span<const int32_t> blocks) { return sender->Digest(blocks); });
}

Loop::~Loop() {
  EndAll();
  parts_.cache->KeepDigests(nullptr);
}

void Loop::Run() {
  bool busy = true;
  while (!done()) busy = Step(busy ? absl::ZeroDuration() : IdleWait());
  EndAll();
}

bool Loop::Step(absl::Duration wait) {
  AdmitArrivals(wait);
  const std::vector<worker::PromptChunk> chunks =
      worker::NextPromptBatch(MakeView(), options_.limits);
  const bool launched = Launch(chunks);
  return CollectAndPublish(launched) || launched;
}

// ---- admit ----

void Loop::AdmitArrivals(absl::Duration wait) {
  for (Event& event : parts_.inbox->Drain(wait)) {
    std::visit([this](auto& e) { Handle(std::move(e)); }, event);
    reporter_.NoteChange();
  }
  DropLate();
  for (Sequence* s : returns_.Late()) {
    spdlog::warn("{}: the blocks asked back from {} do not come, computing them here",
                 s->work.request_id, s->work.target.peer_worker_id);
    GiveUpReturn(s, ReturnResult::kLate);
    reporter_.NoteChange();
  }
  if (!stop_) AdmitWaiting();
}

void Loop::DropLate() {
  const absl::Time now = parts_.clock->Now();
  std::vector<Sequence*> late;
  for (const auto& [key, s] : sequences_) {
    if (now >= s->work.deadline) late.push_back(s.get());
  }
  for (Sequence* s : late) {
    s->work.deadline = absl::InfiniteFuture();  // once
    reporter_.NoteChange();
    if (s->phase == Phase::kShipping) {
      shipper_.Abort(*s);  // its blocks go when the sender has let go of them
      continue;
    }
    parts_.metrics->worker.requests_cancelled.Increment();
    Fail(s, DeadlineExceeded("the deadline passed after {} of {} prompt tokens", s->computed,
                             s->length()));
  }
}

absl::Status Loop::Accept(const Work& work) const {
  if (stop_ || draining_) return Unavailable("prefill worker {} is draining", options_.worker_id);
  const TransferKey key = {work.target.id, work.target.epoch};
  if (sequences_.contains(key) || shipper_.IsPast(key)) {
    return AlreadyExists("transfer {} epoch {} was asked for already", work.target.id.ToHex(),
                         work.target.epoch);
  }
  const int blocks = options_.layout.BlocksFor(static_cast<int>(work.tokens.size()));
  const int total = parts_.pool->counts().total;
  if (blocks > total) {
    return InvalidArgument(
        "token_ids: {} prompt tokens need {} KV blocks, the worker's pool has {} (raise "
        "--kv-cache-memory-bytes)",
        work.tokens.size(), blocks, total);
  }
  if (static_cast<int>(waiting_.size()) >= options_.max_waiting) {
    return ResourceExhausted("prefill worker {}: {} prompts are waiting already (--max-waiting)",
                             options_.worker_id, waiting_.size());
  }
  return absl::OkStatus();
}

void Loop::Handle(WorkArrived event) {
  Work& work = event.work;
  if (const absl::Status status = Accept(work); !status.ok()) {
    parts_.metrics->worker.requests_rejected.Increment();
    work.reply(status);
    return;
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->hash_seed =
      BlockHashSeed(options_.cluster_secret, options_.model_digest, work.cache_salt);
  sequence->work = std::move(work);
  Sequence* s = sequence.get();
  s->waits_since = s->work.arrived;
  s->trace = RequestTrace::Begin(parts_.spans, s->work.trace, "prefill.request", s->work.arrived);
  by_work_id_.emplace(s->work.id, s);
  sequences_.emplace(s->key(), std::move(sequence));
  waiting_.Insert(s);
}

void Loop::Handle(WorkCancelled event) {
  Sequence* s = Find(event.id);
  if (s == nullptr) return;
  parts_.metrics->worker.requests_cancelled.Increment();
  Fail(s, Cancelled("prefill was cancelled by its caller or its deadline"));
}

void Loop::Handle(KvSealed event) {
  int blocks = 0;
  Sequence* s = returns_.OnSealed(event.id, event.epoch, event.stats, &blocks);
  if (s == nullptr) return;
  const auto filled = static_cast<size_t>(blocks) * static_cast<size_t>(options_.layout.block_size);
  parts_.cache->Insert(s->hash_seed, std::span(s->work.tokens).first(filled), s->lease,
                       blocks - s->returned / options_.layout.block_size);
  if (const absl::Status status = Start(s, blocks); !status.ok()) {
    parts_.metrics->worker.requests_failed.Increment();
    Fail(s, status);
  }
}

void Loop::Handle(KvFailed event) {
  Sequence* s = returns_.OnFailed(event.id, event.epoch);
  if (s == nullptr) return;
  spdlog::warn("{}: the blocks asked back from {} were lost, computing them here: {}",
               s->work.request_id, s->work.target.peer_worker_id, event.status.ToString());
  GiveUpReturn(s, Returns::ResultOf(event.status));
}

void Loop::Handle(KvQuiet event) { returns_.OnQuiet(event.id, event.epoch); }

void Loop::GiveUpReturn(Sequence* s, ReturnResult why) {
  returns_.Abandon(s, why);
  s->lease.Release();
  s->phase = Phase::kWaiting;
  waiting_.Insert(s);
}

void Loop::Handle(KvShipped event) {
  const auto it = sequences_.find(TransferKey{event.id, event.epoch});
  if (it == sequences_.end()) return;
  Sequence* s = it->second.get();
  TANDEM_CHECK(s->phase == Phase::kRunning || s->phase == Phase::kShipping,
               "a transfer ended that was never opened");
  const kvtransfer::KvSendTarget& target = s->work.target;
  KvLinkMetrics& link = parts_.metrics->worker.KvLink(
      options_.worker_id, target.peer_worker_id,
      event.stats.transport.empty() ? target.transport : event.stats.transport);
  link.bytes.Increment(static_cast<double>(event.stats.bytes));
  if (event.status.ok()) {
    link.seconds.Observe(absl::ToDoubleSeconds(event.stats.last_byte - event.stats.first_byte));
  } else {
    link.failures.Increment();
  }
  if (s->phase == Phase::kRunning) {
    // The peer is gone or gave up: nobody waits for this prompt any more.
    parts_.metrics->worker.requests_failed.Increment();
    parts_.cache->Retract(s->lease);
    std::erase(running_, s);
    by_work_id_.erase(s->work.id);
    EndTrace(s, parts_.clock->Now(), absl::StatusCode::kUnavailable);
    s->work.reply(Unavailable("KV transfer to {} ended early: {}", target.peer_worker_id,
                              event.status.ToString()));
  }
  Forget(s);
}

void Loop::Handle(worker::SnapshotWanted) { reporter_.ReportSnapshot(); }

void Loop::Handle(worker::DrainWanted) { draining_ = true; }

void Loop::Handle(worker::StopWanted) {
  stop_ = true;
  const absl::Status status = Unavailable("prefill worker {} is stopping", options_.worker_id);
  std::vector<Sequence*> open;
  for (const auto& [id, sequence] : by_work_id_) open.push_back(sequence);
  for (Sequence* sequence : open) Fail(sequence, status);
}

void Loop::AdmitWaiting() {
  if (waiting_.size() == 0) return;
  for (Sequence* sequence : waiting_.Choose(*parts_.cache, parts_.pool->NumAvailable())) {
    const absl::Status status = Admit(sequence);
    // An earlier one of this round may have evicted what this one would have shared.
    if (absl::IsResourceExhausted(status)) break;
    if (status.ok()) continue;
    parts_.metrics->worker.requests_failed.Increment();
    Fail(sequence, status);
  }
}

absl::Status Loop::Admit(Sequence* s) {
  const int block_size = options_.layout.block_size;
  engine::BlockLease lease =
      parts_.cache->Match(s->hash_seed, s->work.tokens, s->MaxCachedBlocks(block_size));
  const int cached_blocks = lease.size();
  TANDEM_ASSIGN_OR_RETURN(
      engine::BlockLease rest,
      parts_.pool->Reserve(options_.layout.BlocksFor(s->length()) - cached_blocks));
  lease.Append(std::move(rest));
  s->lease = std::move(lease);
  if (returns_.Begin(s, cached_blocks)) {
    waiting_.Remove(s);
    return absl::OkStatus();
  }
  TANDEM_RETURN_IF_ERROR(Start(s, cached_blocks));
  waiting_.Remove(s);
  return absl::OkStatus();
}

absl::Status Loop::Start(Sequence* s, int cached_blocks) {
  s->phase = Phase::kWaiting;
  if (const absl::Status status = shipper_.Begin(s, cached_blocks); !status.ok()) {
    s->lease.Release();
    return status;
  }
  s->cached = s->computed = s->launched = cached_blocks * options_.layout.block_size;
  s->inserted_blocks = cached_blocks;
  s->phase = Phase::kRunning;
  running_.push_back(s);
  if (s->work.progress) s->work.progress(s->computed);
  return absl::OkStatus();
}

void Loop::ShareNewlyCached(Sequence* s) {
  const int block_size = options_.layout.block_size;
  const int held = s->computed / block_size;
  engine::BlockLease more = parts_.cache->MatchMore(s->hash_seed, s->work.tokens, s->lease, held,
                                                    s->MaxCachedBlocks(block_size));
  if (more.empty()) return;
  const int cached_blocks = held + more.size();
  // The blocks that it would have computed in their place go back to the pool.
  engine::BlockLease rest = s->lease.SplitTail(held).SplitTail(more.size());
  s->lease.Append(std::move(more));
  s->lease.Append(std::move(rest));
  s->cached = s->computed = s->launched = cached_blocks * block_size;
  s->inserted_blocks = cached_blocks;
  shipper_.PushCached(s, cached_blocks);
}

// ---- plan and launch ----

std::vector<worker::PromptView> Loop::MakeView() {
  in_view_.clear();
  std::vector<worker::PromptView> view;
  if (stop_) return view;
  for (Sequence* s : running_) {
    if (!s->has_started()) ShareNewlyCached(s);
    if (s->launched == s->length()) continue;  // its last chunk is in flight
    in_view_.push_back(s);
    view.push_back({.remaining = s->length() - s->launched,
                    .priority = s->work.priority,
                    .arrival = s->work.id});
  }
  return view;
}

bool Loop::Launch(const std::vector<worker::PromptChunk>& chunks) {
  if (chunks.empty()) return false;
  const absl::Time now = parts_.clock->Now();
  engine::Batch batch;
  std::vector<worker::LaunchedRun> runs;
  for (const worker::PromptChunk& chunk : chunks) {
    Sequence* s = in_view_[static_cast<size_t>(chunk.prompt)];
    if (!s->has_started()) s->started = now;
    const int end = s->launched + chunk.num_tokens;
    const bool last = end == s->length();
    engine::BatchItem& item = batch.items.emplace_back();
    item.tokens = s->work.tokens;
    item.start = s->launched;
    item.num_tokens = chunk.num_tokens;
    item.prompt_length = s->prompt_length();
    item.block_table = s->lease.blocks();
    item.sampling = last ? &s->work.sampling : nullptr;
    item.prompt_logprobs = s->work.sampling.prompt_logprobs;
    shipper_.NoteForBatch(s, end);
    runs.push_back({s->work.id, s->launched, chunk.num_tokens, last});
    s->launched = end;
  }
  batch.wants_layer_events = shipper_.has_notes();
  reporter_.NoteChange();
  const absl::StatusOr<engine::LaunchedStep> launched = steps_.Launch(batch, runs);
  if (launched.ok()) {
    shipper_.PushWith(*launched);
    return true;
  }
  shipper_.DropNotes();
  spdlog::error("a batch of {} prompts was refused: {}", runs.size(), launched.status().ToString());
  for (const worker::LaunchedRun& run : runs) {
    if (Sequence* s = Find(run.sequence)) FailComputed(s, ForwardPassFailed(launched.status()));
  }
  return false;
}

// ---- collect and publish ----

// False if nothing was in flight.
bool Loop::CollectAndPublish(bool launched) {
  // Right after a launch the device may be given one step more before the host waits for one.
  const bool collect = !steps_.empty() && (steps_.full() || !launched);
  if (collect) Publish(steps_.Collect());
  NoteDamagedBlocks();
  reporter_.Report([this] { return Load(); });
  return collect;
}

void Loop::Publish(worker::CollectedStep step) {
  WorkerMetrics& metrics = parts_.metrics->worker;
  const int num_tokens = step.NumTokens();
  metrics.step_seconds.Observe(absl::ToDoubleSeconds(step.took));
  metrics.batch_tokens.Observe(num_tokens);
  metrics.batch_sequences.Observe(static_cast<double>(step.runs.size()));
  reporter_.NoteChange();
  if (step.output.ok()) {
    rate_.AddStep(num_tokens, step.took);
    saturated_.AddStep(num_tokens, options_.limits.max_num_batched_tokens, step.took);
    metrics.prompt_tokens.Increment(num_tokens);
  } else {
    spdlog::error("forward pass over {} prompts failed: {}", step.runs.size(),
                  step.output.status().ToString());
  }
  for (size_t i = 0; i < step.runs.size(); ++i) {
    // Null where the prompt ended after the launch: nobody wants what came of it.
    Sequence* s = Find(step.runs[i].sequence);
    if (s == nullptr) continue;
    if (!step.output.ok()) {
      FailComputed(s, ForwardPassFailed(step.output.status()));
    } else if (!step.output->items[i].status.ok()) {
      FailComputed(s, ForwardPassFailed(step.output->items[i].status));
    } else {
      PublishChunk(s, step.runs[i], std::move(step.output->items[i]));
    }
  }
}

void Loop::PublishChunk(Sequence* s, const worker::LaunchedRun& run, engine::ItemOutput output) {
  s->computed = run.start + run.num_tokens;
  std::move(output.prompt_logprobs.begin(), output.prompt_logprobs.end(),
            std::back_inserter(s->prompt_logprobs));
  TANDEM_CHECK(output.has_token == run.draws, "token after {} of {} prompt tokens", s->computed,
               s->length());
  // At the end from the first block on: that repairs what evictions took out of the chain.
  parts_.cache->Insert(s->hash_seed,
                       std::span(s->work.tokens).first(static_cast<size_t>(s->computed)), s->lease,
                       run.draws ? 0 : s->inserted_blocks);
  s->inserted_blocks = s->computed / options_.layout.block_size;
  if (!run.draws) {
    if (s->work.progress) s->work.progress(s->computed);
    return;
  }
  parts_.cache->Prove(s->lease);
  Finish(s, std::move(output.token));
}

void Loop::Finish(Sequence* s, TokenLogprob first_token) {
  const absl::Time now = parts_.clock->Now();
  shipper_.Finish(*s);
  std::erase(running_, s);
  by_work_id_.erase(s->work.id);
  s->phase = Phase::kShipping;
  Outcome outcome{
      .first_token = std::move(first_token),
      .prompt_logprobs = std::move(s->prompt_logprobs),
      .cached_tokens = s->cached,
      .returned_tokens = s->returned,
      .queue = s->started - s->work.arrived - s->return_took,
      .kv_return = s->return_took,
      .prefill = now - s->started,
      .kv_bytes = s->work.target.target_blocks.size() * options_.layout.BlockBytes(),
  };
  parts_.metrics->worker.stage(Stage::kPrefillQueue).Observe(absl::ToDoubleSeconds(outcome.queue));
  parts_.metrics->worker.stage(Stage::kPrefill).Observe(absl::ToDoubleSeconds(outcome.prefill));
  parts_.metrics->worker.requests_finished.Increment();
  parts_.metrics->worker.generation_tokens.Increment();
  EndTrace(s, now, absl::StatusCode::kOk);
  s->work.reply(std::move(outcome));
}

void Loop::EndTrace(Sequence* s, absl::Time now, absl::StatusCode code) {
  if (s->trace == nullptr) return;
  s->trace->Add("prefill_queue", s->waits_since, s->has_started() ? s->started : now);
  if (s->has_started()) s->trace->Add("prefill", s->started, now);
  s->trace->End(now, code,
                {{"id", s->work.request_id},
                 {"prompt_tokens", int64_t{s->length()}},
                 {"cached_tokens", int64_t{s->cached}},
                 {"returned_tokens", int64_t{s->returned}},
                 {"computed_tokens", int64_t{s->computed - s->cached}}});
  s->trace.reset();
}

void Loop::FailComputed(Sequence* s, const absl::Status& status) {
  const std::vector<int32_t> broken = parts_.cache->Retract(s->lease);
  parts_.metrics->worker.requests_failed.Increment();
  Fail(s, status);
  // Those that share them computed on top of them. (A prompt that was replied to had sound logits.)
  for (const int32_t block : broken) {
    const auto holds = [block](const Sequence* other) {
      const std::span<const int32_t> blocks = other->lease.blocks();
      return std::find(blocks.begin(), blocks.end(), block) != blocks.end();
    };
    while (true) {
      const auto other = std::find_if(running_.begin(), running_.end(), holds);
      if (other == running_.end()) break;
      FailComputed(*other, Unavailable("prefill worker {}: a block of a shared prefix was broken",
                                       options_.worker_id));
    }
    // Nothing was computed for these yet: they look again what is cached.
    const std::vector<Sequence*> returning = returns_.waiting();
    for (Sequence* other : returning) {
      if (holds(other)) GiveUpReturn(other, ReturnResult::kCancelled);
    }
  }
}

absl::Status Loop::ForwardPassFailed(const absl::Status& why) const {
  return Internal("prefill worker {}: forward pass failed: {}", options_.worker_id, MessageOf(why));
}

void Loop::NoteDamagedBlocks() {
  const uint64_t damaged = parts_.cache->damaged_blocks();
  if (damaged == damaged_blocks_seen_) return;
  const uint64_t more = damaged - std::exchange(damaged_blocks_seen_, damaged);
  spdlog::error(
      "{} cached KV blocks were damaged in memory since they were computed; they are "
      "computed again",
      more);
  parts_.metrics->worker.damaged_blocks.Increment(static_cast<double>(more));
}

// ---- ends ----

Sequence* Loop::Find(uint64_t id) const {
  const auto it = by_work_id_.find(id);
  return it == by_work_id_.end() ? nullptr : it->second;
}

void Loop::Fail(Sequence* s, const absl::Status& status) {
  by_work_id_.erase(s->work.id);
  if (s->phase == Phase::kReturning) {
    returns_.Abandon(s, ReturnResult::kCancelled);
    s->phase = Phase::kWaiting;
  }
  EndTrace(s, parts_.clock->Now(), status.code());
  s->work.reply(status);
  if (s->phase == Phase::kWaiting) {
    waiting_.Remove(s);
    Forget(s);
    return;
  }
  parts_.cache->Retract(s->lease);
  std::erase(running_, s);
  s->phase = Phase::kShipping;  // the sender may still read: blocks go back when it is done
  shipper_.Abort(*s);
}

void Loop::Forget(Sequence* s) {
  const TransferKey key = s->key();
  steps_.Drop(s->work.id, std::move(s->lease));
  sequences_.erase(key);
  shipper_.NotePast(key);
}

LoadReport Loop::Load() const {
  LoadReport load;
  load.running = static_cast<int>(sequences_.size() - waiting_.size());
  load.waiting = static_cast<int>(waiting_.size());
  load.waiting_tokens = waiting_.num_tokens();
  for (const Sequence* s : running_) load.waiting_tokens += s->length() - s->computed;
  for (const Sequence* s : returns_.waiting()) {
    load.waiting_tokens += s->length() - s->coming_back->end_block * options_.layout.block_size;
  }
  load.prefill_tokens_per_second = rate_.TokensPerSecond();
  load.prefill_fit_tokens = rate_.Tokens();
  load.saturated_tokens_per_second = saturated_.TokensPerSecond();
  load.links = parts_.sender->Links();
  parts_.metrics->worker.ShowLinks(options_.worker_id, load.links);
  return load;
}

// Idempotent.
void Loop::EndAll() {
  parts_.inbox->Close();
  Handle(worker::StopWanted{});
  AdmitArrivals(absl::ZeroDuration());  // refuses what came meanwhile
}

}  // namespace tandem::prefill
