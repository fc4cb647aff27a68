#include "decode_worker/publisher.h"

#include <algorithm>
#include <utility>

#include "common/base/refusal.h"
#include "common/base/status.h"

namespace tandem::decode {

namespace {

LogFields Describe(const Sequence& s) {
  LogFields out = {{"id", s.work.request_id},
                   {"prompt_tokens", int64_t{s.prompt_length}},
                   {"cached_tokens", int64_t{s.cached_tokens}},
                   {"generated_tokens", int64_t{s.drawn()}},
                   {"prefill_worker", s.timing.prefill_worker},
                   {"prefill_attempts", int64_t{s.timing.prefill_attempts}},
                   {"transport", s.timing.transport},
                   {"kv_bytes", static_cast<int64_t>(s.timing.kv_bytes)},
                   {"preemptions", int64_t{s.timing.preemptions}}};
  if (s.arrived_length > s.prompt_length) {
    out.emplace_back("resumed_tokens", int64_t{s.arrived_length - s.prompt_length});
  }
  return out;
}

}  // namespace

Publisher::Publisher(PublisherOptions options, StreamWaker* waker, DecodeMetrics* metrics)
    : options_(options), waker_(waker), metrics_(metrics) {}

bool Publisher::Emit(Sequence* s, TokenLogprob token, absl::Time now, bool sent) {
  const int32_t id = token.token;
  s->tokens.push_back(id);
  const bool first = s->drawn() == 1;
  if (first) {
    s->first_token_at = now;
  } else {
    metrics_->worker.inter_token_seconds.Observe(absl::ToDoubleSeconds(now - s->last_token_at));
  }
  if (s->drawn() == 2) {
    if (s->trace != nullptr) s->trace->Add("first_decode_step", s->runnable_at, now);
    s->timing.stages[Stage::kFirstDecodeStep] = absl::ToDoubleMilliseconds(now - s->runnable_at);
  }
  s->last_token_at = now;
  const absl::Time preempted_at = std::exchange(s->preempted_at, absl::InfiniteFuture());
  if (preempted_at < now && !first) {  // else it is part of the prefill
    if (s->trace != nullptr) s->trace->Add("preempted", preempted_at, now);
    s->timing.stages[Stage::kPreempted] += absl::ToDoubleMilliseconds(now - preempted_at);
  }

  const FinishReason reason =
      EndAfter(s->work.sampling, s->generated(), s->length(), s->max_length, id);
  const bool last = reason != FinishReason::kNone;
  if (sent) return last;
  TokenEvent event;
  event.token_ids.push_back(id);
  if (s->work.sampling.logprobs >= 0) event.logprobs.push_back(std::move(token));
  if (first) event.prompt_logprobs = std::exchange(s->prompt_logprobs, {});
  event.cached_tokens = s->cached_tokens;
  event.finish_reason = reason;
  event.drafts = std::exchange(s->drafts, {});
  if (first || last) event.timing = s->timing;
  if (s->stream->Append(std::move(event))) WakeLater(s->stream);
  if (!last && !s->paused() && s->stream->pending() >= options_.max_pending_tokens) {
    s->paused_at = now;
    s->stream->NotifyWhenDrained();
    metrics_->slow_readers.Increment();
  }
  return last;
}

void Publisher::EmitProgress(const Sequence& s) {
  if (!s.work.progress || s.drawn() > 0) return;
  TokenEvent event;
  event.computed_tokens = s.computed;
  event.cached_tokens = s.cached_tokens;
  if (s.stream->Append(std::move(event))) WakeLater(s.stream);
}

void Publisher::End(const Sequence& s, const absl::Status& status, absl::Time now) {
  // Behind its last token there is nothing that its reader waits for.
  if (s.trace != nullptr) {
    s.trace->End(status.ok() ? s.last_token_at : now, status.code(), Describe(s));
  }
  if (status.ok()) {
    Measure(s, now);
    metrics_->worker.requests_finished.Increment();
  } else {
    CountFailed(status);
  }
  if (s.stream->End(status)) WakeLater(s.stream);
}

void Publisher::Refuse(std::shared_ptr<TokenStream> stream, const absl::Status& status) {
  CountFailed(status);
  if (stream->End(status)) WakeLater(std::move(stream));
}

void Publisher::CountFailed(const absl::Status& status) {
  WorkerMetrics& metrics = metrics_->worker;
  const bool given_up = absl::IsCancelled(status) || absl::IsDeadlineExceeded(status);
  // The router asks another worker then: that is no failure.
  if (RefusalOf(status).has_value()) return metrics.requests_rejected.Increment();
  (given_up ? metrics.requests_cancelled : metrics.requests_failed).Increment();
}

absl::Status Publisher::CheckReader(Sequence* s, absl::Time now) {
  if (!s->paused()) return absl::OkStatus();
  // Only when half of the bound is free again, so that a reader at the bound does not make its
  // sequence stop and go with every token.
  if (s->stream->pending() < options_.max_pending_tokens / 2 + 1) {
    if (s->trace != nullptr) s->trace->Add("paused", s->paused_at, now);
    s->timing.stages[Stage::kPaused] += absl::ToDoubleMilliseconds(now - s->paused_at);
    s->paused_at = absl::InfiniteFuture();
  } else if (now - s->paused_at >= options_.pause_limit) {
    return Aborted("the reader was {} tokens behind for {} s", s->stream->pending(),
                   absl::ToInt64Seconds(options_.pause_limit));
  }
  return absl::OkStatus();
}

void Publisher::Flush() {
  if (idle_.empty()) return;
  if (waker_ != nullptr) {
    waker_->Wake(std::exchange(idle_, {}));
    return;
  }
  for (const auto& stream : std::exchange(idle_, {})) stream->Wake();
}

void Publisher::Measure(const Sequence& s, absl::Time now) {
  WorkerMetrics& metrics = metrics_->worker;
  const auto observe = [&](Stage stage) {
    metrics.stage(stage).Observe(s.timing.stages[stage] / 1e3);
  };
  observe(Stage::kQueue);
  if (s.timing.prefill_attempts == 0) {  // else the prefill worker tells
    observe(Stage::kPrefillQueue);
    observe(Stage::kPrefill);
  } else {
    observe(Stage::kFailedAttempts);
    observe(Stage::kPrefillCall);
    observe(Stage::kKvTransferTotal);
    observe(Stage::kKvTransferExposed);
  }
  if (s.drawn() < 2) return;
  observe(Stage::kFirstDecodeStep);
  observe(Stage::kPreempted);
  observe(Stage::kPaused);
  metrics_->time_per_output_token.Observe(absl::ToDoubleSeconds(now - s.first_token_at) /
                                          (s.drawn() - 1));
}

}  // namespace tandem::decode
