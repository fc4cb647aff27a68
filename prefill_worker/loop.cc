#include "prefill_worker/loop.h"

#include <algorithm>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::prefill {

PrefillLoop::PrefillLoop(PrefillLoopOptions options, PrefillLoopParts parts, PrefillLoopHooks hooks)
    : options_(std::move(options)), parts_(parts), hooks_(std::move(hooks)) {}

PrefillLoop::~PrefillLoop() { Close(); }

void PrefillLoop::Run() {
  while (!done()) {
    const absl::Duration idle = changed_ ? options_.min_report_interval : options_.report_interval;
    Step(running_.empty() ? idle : absl::ZeroDuration());
  }
  Close();
}

void PrefillLoop::Close() {
  parts_.inbox->Close();
  Handle(PrefillStopWanted{});
  AdmitArrivals(absl::ZeroDuration());  // refuses what came meanwhile
}

bool PrefillLoop::Step(absl::Duration wait) {
  AdmitArrivals(wait);
  const std::vector<PromptChunk> chunks = NextBatch();
  if (!chunks.empty()) {
    const engine::Batch batch = Prepare(chunks);
    const absl::Time started = parts_.clock->Now();
    absl::StatusOr<engine::StepOutput> out = parts_.runner->Run(batch);
    const absl::Duration took = parts_.clock->Now() - started;
    parts_.metrics->step_seconds.Observe(absl::ToDoubleSeconds(took));
    parts_.metrics->batch_tokens.Observe(batch.NumTokens());
    parts_.metrics->batch_sequences.Observe(static_cast<double>(batch.items.size()));
    if (out.ok()) {
      rate_.AddStep(batch.NumTokens(), took);
      parts_.metrics->prompt_tokens.Increment(batch.NumTokens());
      Publish(chunks, *std::move(out));
    } else {
      FailBatch(chunks, out.status());
    }
    changed_ = true;
  }
  Report();
  return !chunks.empty();
}

void PrefillLoop::AdmitArrivals(absl::Duration wait) {
  for (PrefillEvent& event : parts_.inbox->Drain(wait)) {
    std::visit([this](auto&& e) { Handle(std::move(e)); }, std::move(event));
    changed_ = true;
  }
  if (!stop_) AdmitWaiting();
}

std::vector<PromptChunk> PrefillLoop::NextBatch() {
  std::vector<PromptView> view;
  view.reserve(running_.size());
  for (Sequence* sequence : running_) {
    if (sequence->started == absl::InfinitePast()) ShareNewlyCached(sequence);
    view.push_back({.remaining = sequence->length() - sequence->computed,
                    .priority = sequence->work.priority,
                    .arrival = sequence->work.id});
  }
  return stop_ ? std::vector<PromptChunk>() : NextPrefillBatch(view, options_.limits);
}

engine::Batch PrefillLoop::Prepare(const std::vector<PromptChunk>& chunks) {
  const absl::Time now = parts_.clock->Now();
  engine::Batch batch;
  shipments_.clear();
  for (const PromptChunk& chunk : chunks) {
    Sequence& s = *running_[static_cast<size_t>(chunk.prompt)];
    if (s.started == absl::InfinitePast()) s.started = now;
    const int end = s.computed + chunk.num_tokens;
    const bool last = end == s.length();
    engine::BatchItem& item = batch.items.emplace_back();
    item.tokens = s.work.tokens;
    item.start = s.computed;
    item.num_tokens = chunk.num_tokens;
    item.prompt_length = s.length();
    item.block_table = s.lease.blocks();
    item.sampling = last ? &s.work.sampling : nullptr;
    item.prompt_logprobs = s.work.sampling.prompt_logprobs;

    // A partly filled block is only shipped when it is the prompt's last.
    const int end_block = last ? s.lease.size() : end / options_.layout.block_size;
    Shipment shipment{.sequence = &s};
    for (int b = std::max(s.pushed_blocks, s.work.first_block); b < end_block; ++b) {
      shipment.blocks.push_back(s.lease.blocks()[static_cast<size_t>(b)]);
      shipment.ordinals.push_back(b - s.work.first_block);
    }
    s.pushed_blocks = std::max(s.pushed_blocks, end_block);
    if (!shipment.blocks.empty()) shipments_.push_back(std::move(shipment));
  }
  batch.on_layer_done = [this](int layer) {
    for (const Shipment& shipment : shipments_) {
      const kvtransfer::KvSendTarget& target = shipment.sequence->work.target;
      parts_.sender->Push(target.id, target.epoch, layer, shipment.blocks, shipment.ordinals);
    }
  };
  return batch;
}

void PrefillLoop::Publish(const std::vector<PromptChunk>& chunks, engine::StepOutput out) {
  TANDEM_CHECK(out.items.size() == chunks.size(), "{} outputs for {} chunks", out.items.size(),
               chunks.size());
  std::vector<std::pair<Sequence*, engine::TokenLogprob>> finished;
  std::vector<std::pair<Sequence*, absl::Status>> failed;
  for (size_t i = 0; i < chunks.size(); ++i) {
    Sequence& s = *running_[static_cast<size_t>(chunks[i].prompt)];
    engine::ItemOutput& item = out.items[i];
    if (!item.status.ok()) {
      failed.emplace_back(&s, item.status);
      continue;
    }
    s.computed += chunks[i].num_tokens;
    std::move(item.prompt_logprobs.begin(), item.prompt_logprobs.end(),
              std::back_inserter(s.prompt_logprobs));
    const bool last = s.computed == s.length();
    TANDEM_CHECK(item.has_token == last, "token after {} of {} prompt tokens", s.computed,
                 s.length());
    parts_.cache->Insert(s.seed, std::span(s.work.tokens).first(static_cast<size_t>(s.computed)),
                         s.lease, last ? 0 : s.inserted_blocks);
    s.inserted_blocks = s.computed / options_.layout.block_size;
    if (last) finished.emplace_back(&s, std::move(item.token));
  }
  for (auto& [sequence, token] : finished) Finish(sequence, std::move(token));
  for (auto& [sequence, status] : failed) FailComputed(sequence, status);
}

void PrefillLoop::Finish(Sequence* sequence, engine::TokenLogprob first_token) {
  Sequence& s = *sequence;
  const absl::Time now = parts_.clock->Now();
  parts_.sender->Finish(s.work.target.id, s.work.target.epoch);
  std::erase(running_, sequence);
  by_work_id_.erase(s.work.id);
  s.phase = Phase::kShipping;
  PrefillOutcome result{
      .first_token = std::move(first_token),
      .prompt_logprobs = std::move(s.prompt_logprobs),
      .cached_tokens = s.cached,
      .queue = s.started - s.work.arrived,
      .prefill = now - s.started,
      .kv_bytes = s.work.target.target_blocks.size() * options_.layout.BlockBytes(),
  };
  parts_.metrics->stage(Stage::kPrefillQueue).Observe(absl::ToDoubleSeconds(result.queue));
  parts_.metrics->stage(Stage::kPrefill).Observe(absl::ToDoubleSeconds(result.prefill));
  parts_.metrics->requests_finished.Increment();
  parts_.metrics->generation_tokens.Increment();
  s.work.reply(std::move(result));
}

void PrefillLoop::Fail(Sequence* sequence, const absl::Status& status) {
  by_work_id_.erase(sequence->work.id);
  sequence->work.reply(status);
  if (sequence->phase == Phase::kWaiting) {
    std::erase(waiting_, sequence);
    Forget(*sequence);
    return;
  }
  std::erase(running_, sequence);
  sequence->phase = Phase::kShipping;  // the sender may still read: blocks go back when it is done
  parts_.sender->Abort(sequence->work.target.id, sequence->work.target.epoch);
}

void PrefillLoop::FailBatch(const std::vector<PromptChunk>& chunks, const absl::Status& status) {
  spdlog::error("forward pass over {} prompts failed: {}", chunks.size(), status.ToString());
  std::vector<Sequence*> failed;
  for (const PromptChunk& chunk : chunks) {
    failed.push_back(running_[static_cast<size_t>(chunk.prompt)]);
  }
  for (Sequence* sequence : failed) FailComputed(sequence, status);
}

void PrefillLoop::FailComputed(Sequence* sequence, const absl::Status& status) {
  parts_.metrics->requests_failed.Increment();
  Fail(sequence, Internal("prefill worker {}: forward pass failed: {}", options_.worker_id,
                          std::string(status.message())));
}

PrefillLoad PrefillLoop::Load() const {
  PrefillLoad load;
  load.running = static_cast<int>(sequences_.size() - waiting_.size());
  load.waiting = static_cast<int>(waiting_.size());
  for (const Sequence* s : waiting_) load.waiting_tokens += s->length();
  for (const Sequence* s : running_) load.waiting_tokens += s->length() - s->computed;
  load.blocks = parts_.pool->counts();
  load.tokens_per_second = rate_.TokensPerSecond();
  return load;
}

void PrefillLoop::Report() {
  const absl::Duration since = parts_.clock->Now() - last_report_;
  if (since < (changed_ ? options_.min_report_interval : options_.report_interval)) return;
  last_report_ = parts_.clock->Now();
  changed_ = false;
  const PrefillLoad load = Load();
  WorkerMetrics& metrics = *parts_.metrics;
  metrics.requests_running.Set(load.running);
  metrics.requests_waiting.Set(load.waiting);
  metrics.waiting_tokens.Set(static_cast<double>(load.waiting_tokens));
  metrics.kv_blocks.Set(load.blocks.free, load.blocks.cached, load.blocks.used,
                        load.blocks.quarantined);
  const engine::PrefixCache& cache = *parts_.cache;
  metrics.prefix_query_tokens.Increment(static_cast<double>(
      cache.query_tokens() - std::exchange(query_tokens_seen_, cache.query_tokens())));
  metrics.prefix_hit_tokens.Increment(static_cast<double>(
      cache.hit_tokens() - std::exchange(hit_tokens_seen_, cache.hit_tokens())));
  if (hooks_.blocks) {
    const engine::BlockEvents events = parts_.cache->TakeEvents();
    if (!events.stored.empty() || !events.removed.empty()) hooks_.blocks(events, false);
  }
  if (hooks_.report) hooks_.report(load);
}

}  // namespace tandem::prefill
