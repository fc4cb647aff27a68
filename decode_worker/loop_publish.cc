// How tokens leave the loop, and how sequences end.
#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "decode_worker/loop.h"

namespace tandem::decode {
namespace {

bool Contains(const std::vector<int32_t>& values, int32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

// The newest token's effect. kNone: the sequence goes on.
FinishReason DecodeLoop::EndAfter(const Sequence& s, int32_t token) const {
  const engine::SamplingParams& sampling = s.work.sampling;
  if (s.generated() > sampling.min_tokens) {
    if (!sampling.ignore_eos && Contains(sampling.eos_token_ids, token)) return FinishReason::kStop;
    if (Contains(sampling.stop_token_ids, token)) return FinishReason::kStop;
  }
  const bool full = s.generated() >= sampling.max_tokens || s.length() >= options_.max_model_len;
  return full ? FinishReason::kLength : FinishReason::kNone;
}

void DecodeLoop::Emit(Sequence* s, engine::TokenLogprob token, absl::Time now) {
  const int32_t id = token.token;
  s->tokens.push_back(id);
  parts_.metrics->worker.generation_tokens.Increment();
  const bool first = s->generated() == 1;
  if (first) {
    s->first_token_at = now;
  } else {
    parts_.metrics->worker.inter_token_seconds.Observe(
        absl::ToDoubleSeconds(now - s->last_token_at));
  }
  if (s->generated() == 2) {
    s->times.first_decode_step = absl::ToDoubleMilliseconds(now - s->runnable_at);
  }
  s->last_token_at = now;

  TokenDelta delta;
  delta.tokens.push_back(std::move(token));
  if (first) delta.prompt_logprobs = std::exchange(s->prompt_logprobs, {});
  delta.cached_tokens = s->cached_tokens;
  delta.finish = EndAfter(*s, id);
  const bool last = delta.finish != FinishReason::kNone;
  if (first || last) delta.times = s->times;
  s->stream->Append(std::move(delta));
  if (last) return Close(s, absl::OkStatus());
  if (!s->paused() && s->stream->pending() >= options_.max_pending_tokens) {
    s->paused_at = now;
    s->stream->NotifyWhenDrained();
    parts_.metrics->slow_readers.Increment();
  }
}

// Ends the stream and gives all blocks back (or into quarantine). The sequence itself stays until
// Sweep().
void DecodeLoop::Close(Sequence* s, const absl::Status& status) {
  TANDEM_CHECK(!s->closed, "a sequence ends once");
  s->closed = true;
  changed_ = true;
  prefills_.Abandon(s);
  CacheComputed(s);
  s->lease.Release();
  WorkerMetrics& metrics = parts_.metrics->worker;
  if (status.ok()) {
    Observe(*s, parts_.clock->Now());
    metrics.requests_finished.Increment();
  } else if (absl::IsCancelled(status) || absl::IsDeadlineExceeded(status)) {
    metrics.requests_cancelled.Increment();
  } else {
    metrics.requests_failed.Increment();
  }
  s->stream->End(status);
}

// Makes the full blocks computed so far known, so that a next turn of the conversation finds them.
void DecodeLoop::CacheComputed(Sequence* s) {
  const int full = s->computed / options_.limits.block_size;
  if (full <= s->cached_blocks) return;
  const auto tokens = std::span<const int32_t>(s->tokens).first(static_cast<size_t>(s->computed));
  parts_.cache->Insert(s->hash_seed, tokens, s->lease, s->cached_blocks);
  s->cached_blocks = full;
}

void DecodeLoop::Observe(const Sequence& s, absl::Time now) {
  WorkerMetrics& metrics = parts_.metrics->worker;
  const auto observe = [&metrics](Stage stage, double milliseconds) {
    metrics.stage(stage).Observe(milliseconds / 1e3);
  };
  observe(Stage::kQueue, s.times.decode_queue);
  if (s.times.prefill_attempts == 0) {  // else the prefill worker tells
    observe(Stage::kPrefillQueue, s.times.prefill_queue);
    observe(Stage::kPrefill, s.times.prefill);
  } else {
    observe(Stage::kKvTransferTotal, s.times.kv_transfer_total);
    observe(Stage::kKvTransferExposed, s.times.kv_transfer_exposed);
  }
  if (s.generated() < 2) return;
  observe(Stage::kFirstDecodeStep, s.times.first_decode_step);
  parts_.metrics->time_per_output_token.Observe(absl::ToDoubleSeconds(now - s.first_token_at) /
                                                (s.generated() - 1));
}

}  // namespace tandem::decode
