#include "decode_worker/loop.h"

#include <algorithm>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::decode {

DecodeLoop::DecodeLoop(LoopOptions options, LoopParts parts, LoopHooks hooks)
    : options_(std::move(options)),
      parts_(parts),
      hooks_(std::move(hooks)),
      prefills_(parts.receiver, parts.caller, parts.pool, parts.clock, options_.prefill_timeout) {
  const SchedulerLimits& limits = options_.limits;
  TANDEM_CHECK(limits.max_num_batched_tokens >= limits.max_num_seqs,
               "a batch of {} tokens cannot hold a decode step of {} sequences",
               limits.max_num_batched_tokens, limits.max_num_seqs);
  TANDEM_CHECK(BlocksFor(options_.max_model_len, limits.block_size) <= parts_.pool->counts().total,
               "the pool does not hold one sequence of max_model_len {}", options_.max_model_len);
  TANDEM_CHECK(options_.unified || (parts_.receiver != nullptr && parts_.caller != nullptr));
}

DecodeLoop::~DecodeLoop() {
  parts_.inbox->Close();
  draining_ = true;  // what arrived and was not looked at is refused
  AdmitArrivals(absl::ZeroDuration());
  for (auto& sequence : sequences_) Close(sequence.get(), Unavailable("the worker stops"));
  Sweep();
}

void DecodeLoop::Run() {
  bool busy = true;
  while (!done()) busy = Step(busy ? absl::ZeroDuration() : options_.report_interval);
  parts_.inbox->Close();
}

bool DecodeLoop::Step(absl::Duration wait) {
  AdmitArrivals(wait);
  const Plan plan = NextBatch(View(), options_.limits);
  const engine::Batch batch = Prepare(plan);
  if (!batch.items.empty()) {
    const absl::Time started = parts_.clock->Now();
    absl::StatusOr<engine::StepOutput> out = parts_.runner->Run(batch);
    if (out.ok()) {
      Publish(batch, *out, started);
    } else {
      FailBatch(out.status());
    }
  }
  Sweep();
  Report();
  return !batch.items.empty() || !plan.preempt.empty() || !plan.resume.empty();
}

void DecodeLoop::AdmitArrivals(absl::Duration wait) {
  for (DecodeEvent& event : parts_.inbox->Drain(wait)) {
    std::visit([this](auto& e) { Handle(std::move(e)); }, event);
  }
  CheckTimers();
  Sweep();
}

SchedulerView DecodeLoop::View() const {
  SchedulerView view;
  view.free_blocks = parts_.pool->NumAvailable();
  view.sequences.reserve(sequences_.size());
  for (const auto& s : sequences_) {
    view.sequences.push_back({s->phase, s->length(), s->computed, s->lease.size(), s->paused()});
  }
  return view;
}

// Gives the plan's sequences their blocks and makes the batch of it.
engine::Batch DecodeLoop::Prepare(const Plan& plan) {
  for (int i : plan.preempt) Preempt(sequences_[static_cast<size_t>(i)].get());
  engine::Batch batch;
  batch_sequences_.clear();
  const absl::Time now = parts_.clock->Now();
  for (const ScheduledRun& run : plan.runs) {
    Sequence* s = sequences_[static_cast<size_t>(run.sequence)].get();
    if (run.new_blocks > 0) {
      absl::StatusOr<engine::BlockLease> more = parts_.pool->Reserve(run.new_blocks);
      if (!more.ok()) continue;  // blocks were shared: the next plan preempts one more
      s->lease.Append(*std::move(more));
    }
    const int end = s->computed + run.num_tokens;
    engine::BatchItem& item = batch.items.emplace_back();
    item.tokens = s->tokens;
    item.start = s->computed;
    item.num_tokens = run.num_tokens;
    item.prompt_length = s->prompt_length;
    item.block_table = s->lease.blocks();
    item.sampling = end == s->length() ? &s->work.sampling : nullptr;
    if (s->generated() == 0) item.prompt_logprobs = s->work.sampling.prompt_logprobs;
    s->prefill_started_at = std::min(s->prefill_started_at, now);
    batch_sequences_.push_back(s);
  }
  for (int i : plan.resume) {
    if (!Resume(sequences_[static_cast<size_t>(i)].get())) break;
  }
  return batch;
}

void DecodeLoop::Publish(const engine::Batch& batch, const engine::StepOutput& out,
                         absl::Time started) {
  TANDEM_CHECK(out.items.size() == batch.items.size());
  const absl::Time now = parts_.clock->Now();
  int chunk_tokens = 0;
  int decode_steps = 0;
  for (size_t i = 0; i < batch.items.size(); ++i) {
    const engine::BatchItem& item = batch.items[i];
    const engine::ItemOutput& result = out.items[i];
    Sequence* s = batch_sequences_[i];
    (item.num_tokens == 1 ? decode_steps : chunk_tokens) += item.num_tokens;
    if (!result.status.ok()) {
      FailSequence(s, result.status);
      continue;
    }
    s->computed += item.num_tokens;
    if (item.start < s->prompt_length) {
      parts_.metrics->worker.prompt_tokens.Increment(item.num_tokens);
      s->prompt_logprobs.insert(s->prompt_logprobs.end(), result.prompt_logprobs.begin(),
                                result.prompt_logprobs.end());
      if (s->computed >= s->prompt_length) CacheComputed(s);
    }
    if (item.sampling == nullptr) continue;
    TANDEM_CHECK(result.has_token, "the runner drew no token");
    if (s->generated() == 0) {  // a local prefill is done
      s->times.prefill_queue = absl::ToDoubleMilliseconds(s->prefill_started_at - s->reserved_at);
      s->times.prefill = absl::ToDoubleMilliseconds(now - s->prefill_started_at);
      s->runnable_at = now;
    }
    Emit(s, result.token, now);
  }
  WorkerMetrics& metrics = parts_.metrics->worker;
  metrics.step_seconds.Observe(absl::ToDoubleSeconds(now - started));
  metrics.batch_tokens.Observe(decode_steps + chunk_tokens);
  metrics.batch_sequences.Observe(static_cast<double>(batch.items.size()));
  meter_.AddStep(decode_steps, chunk_tokens, now - started);
}

void DecodeLoop::FailBatch(const absl::Status& status) {
  spdlog::error("a batch of {} sequences failed: {}", batch_sequences_.size(), status.ToString());
  for (Sequence* s : batch_sequences_) FailSequence(s, status);
}

void DecodeLoop::FailSequence(Sequence* s, const absl::Status& status) {
  s->computed = 0;  // nothing of what the batch wrote may be found again
  Close(s, Internal("the forward pass failed: {}", std::string(status.message())));
}

void DecodeLoop::Preempt(Sequence* s) {
  CacheComputed(s);  // what is not evicted need not be computed again
  s->lease.Release();
  s->computed = 0;
  s->cached_blocks = 0;
  s->phase = SequencePhase::kPreempted;
  if (s->generated() == 0) s->prompt_logprobs.clear();
  ++s->times.preemptions;
  parts_.metrics->worker.preemptions.Increment();
  changed_ = true;
}

bool DecodeLoop::Resume(Sequence* s) {
  const int block_size = options_.limits.block_size;
  // At least the last token is computed: its output is the next draw.
  const bool all = s->generated() == 0 && s->work.sampling.prompt_logprobs >= 0;
  engine::BlockLease lease =
      parts_.cache->Match(s->hash_seed, s->tokens, all ? 0 : (s->length() - 1) / block_size);
  const int cached = lease.size();
  absl::StatusOr<engine::BlockLease> fresh =
      parts_.pool->Reserve(BlocksFor(s->length() + 1, block_size) - cached);
  if (!fresh.ok()) return false;
  lease.Append(*std::move(fresh));
  s->lease = std::move(lease);
  s->computed = cached * block_size;
  s->cached_blocks = cached;
  s->phase = SequencePhase::kRunnable;
  changed_ = true;
  return true;
}

void DecodeLoop::CheckTimers() {
  const absl::Time now = parts_.clock->Now();
  for (auto& s : sequences_) {
    if (s->closed) continue;
    if (now >= s->work.deadline) {
      Close(s.get(), DeadlineExceeded("deadline passed after {} generated tokens", s->generated()));
      continue;
    }
    if (s->paused()) {
      if (s->stream->pending() < options_.max_pending_tokens / 2 + 1) {
        s->paused_at = absl::InfiniteFuture();
      } else if (now - s->paused_at >= options_.pause_limit) {
        Close(s.get(), Aborted("the reader was {} tokens behind for {} s", s->stream->pending(),
                               absl::ToInt64Seconds(options_.pause_limit)));
        continue;
      }
    }
    const PrefillAttempt* attempt = s->attempt.get();
    if (attempt != nullptr && attempt->replied && !attempt->sealed &&
        now - attempt->replied_at >= options_.kv_seal_timeout) {
      CountKvFailure(*s);
      LoseKv(s.get(), DeadlineExceeded("the KV blocks were not complete {} s after the first token",
                                       absl::ToDoubleSeconds(options_.kv_seal_timeout)));
    }
  }
}

void DecodeLoop::Sweep() {
  std::erase_if(sequences_, [](const auto& s) { return s->closed; });
}

void DecodeLoop::Report() {
  engine::BlockEvents events = parts_.cache->TakeEvents();
  if (hooks_.blocks && !(events.stored.empty() && events.removed.empty())) {
    hooks_.blocks(events, /*cleared=*/false);
  }
  const absl::Time now = parts_.clock->Now();
  if (!changed_ && now - last_report_ < options_.report_interval) return;
  changed_ = false;
  last_report_ = now;
  LoadSnapshot load;
  for (const auto& s : sequences_) {
    ++(s->phase == SequencePhase::kRunnable ? load.running : load.waiting);
    if (s->phase != SequencePhase::kAwaitingPrefill && s->length() - s->computed > 1) {
      load.waiting_tokens += s->length() - s->computed;
    }
  }
  load.blocks = parts_.pool->counts();
  load.prefill_tokens_per_second = meter_.PrefillTokensPerSecond();
  load.decode_step_milliseconds = meter_.DecodeStepMilliseconds();
  WorkerMetrics& metrics = parts_.metrics->worker;
  metrics.requests_running.Set(load.running);
  metrics.requests_waiting.Set(load.waiting);
  metrics.waiting_tokens.Set(static_cast<double>(load.waiting_tokens));
  metrics.kv_blocks.Set(load.blocks.free, load.blocks.cached, load.blocks.used,
                        load.blocks.quarantined);
  metrics.prefix_query_tokens.Increment(static_cast<double>(parts_.cache->query_tokens()) -
                                        metrics.prefix_query_tokens.Value());
  metrics.prefix_hit_tokens.Increment(static_cast<double>(parts_.cache->hit_tokens()) -
                                      metrics.prefix_hit_tokens.Value());
  if (hooks_.report) hooks_.report(load);
}

}  // namespace tandem::decode
