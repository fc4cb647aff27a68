#include "router/request/stream_meter.h"

#include <algorithm>
#include <utility>

namespace tandem::router {
namespace {

double Ms(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

}  // namespace

StreamMeter::StreamMeter(const Request* request, RouterMetrics* metrics, SpanSink* spans,
                         Clock* clock)
    : request_(request),
      metrics_(metrics),
      clock_(clock),
      trace_(RequestTrace::Begin(spans, request->trace, "router.request", request->received)),
      queued_since_(request->received + request->tokenize_time) {
  if (trace_ != nullptr) trace_->Add("tokenize", request->received, queued_since_);
}

void StreamMeter::OnStart(const Route& route) {
  decode_worker_ = route.decode.id;
  metrics_->running.Increment();
  started_ = clock_->Now();
  if (trace_ != nullptr) {
    trace_->Add("queue", queued_since_, started_);
    call_ = trace_->NewCall();
    tokens_before_ = completion_tokens_;
  }
  if (completion_tokens_ > 0) return;  // the stages before the first token are known
  queued_ += started_ - queued_since_;
  predicted_cached_tokens_ = route.predicted_cached_tokens;
}

void StreamMeter::OnStop(absl::StatusCode code) {
  metrics_->running.Decrement();
  OnResume();
  queued_since_ = clock_->Now();
  if (trace_ != nullptr) {
    trace_->AddCall(call_, "decode_call", started_, queued_since_,
                    {{"decode_worker", decode_worker_},
                     {"generated_tokens", int64_t{completion_tokens_ - tokens_before_}}},
                    code);
  }
  if (completion_tokens_ > 0) return;
  failed_ += queued_since_ - started_;
}

void StreamMeter::OnPause() {
  if (paused_at_ == kNotYet) paused_at_ = clock_->Now();
}

void StreamMeter::OnResume() {
  if (paused_at_ == kNotYet) return;
  waits_since_ = clock_->Now();
  if (trace_ != nullptr) trace_->Add("paused", paused_at_, waits_since_);
  paused_ += waits_since_ - std::exchange(paused_at_, kNotYet);
}

void StreamMeter::OnMigration() {
  if (left_ != kNotYet) return;  // the worker that it moved to gave no token
  metrics_->migrations.Increment();
  ++migrations_;
  OnResume();
  // A worker that hangs is given up long after its last token.
  left_ = waits_since_;
  before_ = worker_;
}

void StreamMeter::OnWorkerTiming(Timing timing) {
  if (migrations_ == 0) {
    worker_ = std::move(timing);
    return;
  }
  // Where the time before the first token went is what the first worker said; the others add to
  // what is counted.
  worker_.kv_bytes = before_.kv_bytes + timing.kv_bytes;
  worker_.prefill_attempts = before_.prefill_attempts + timing.prefill_attempts;
  worker_.preemptions = before_.preemptions + timing.preemptions;
}

void StreamMeter::OnTokens(size_t count, int cached_tokens) {
  if (count == 0) return;
  const absl::Time now = clock_->Now();
  if (completion_tokens_ == 0) {
    first_token_ = now;
    cached_tokens_ = static_cast<size_t>(std::max(0, cached_tokens));
    metrics_->predicted_hit_tokens.Increment(predicted_cached_tokens_);
    metrics_->actual_hit_tokens.Increment(cached_tokens);
    metrics_->prompt_tokens.Increment(static_cast<double>(request_->tokens.size()));
  } else {
    // Tokens that came together share the gap before them.
    const double gap = absl::ToDoubleSeconds(now - last_token_) / static_cast<double>(count);
    for (size_t i = 0; i < count; ++i) {
      metrics_->inter_token.Observe(gap, request_->trace, now);
    }
  }
  if (left_ != kNotYet) {
    if (trace_ != nullptr) trace_->Add("migration", left_, now);
    migration_ += now - std::exchange(left_, kNotYet);
  }
  last_token_ = waits_since_ = now;
  completion_tokens_ += static_cast<int>(count);
  metrics_->generation_tokens.Increment(static_cast<double>(count));
}

void StreamMeter::OnWrite() {
  if (first_write_ != kNotYet) return;
  first_write_ = clock_->Now();
  metrics_->ttft(request_->tokens.size(), cached_tokens_)
      .Observe(absl::ToDoubleSeconds(first_write_ - request_->received), request_->trace,
               first_write_);
}

Timing StreamMeter::CurrentTiming() const {
  Timing timing = worker_;
  StageTimes& stages = timing.stages;
  stages[Stage::kTokenize] = Ms(request_->tokenize_time);
  // The decode worker's parts of these are in already.
  stages[Stage::kQueue] += Ms(queued_);
  stages[Stage::kFailedAttempts] += Ms(failed_);
  // A decode worker pauses while its tokens are not read: that is the same time again.
  stages[Stage::kPaused] = std::max(stages[Stage::kPaused], Ms(paused_));
  if (first_write_ != kNotYet) {
    stages[Stage::kTtft] = Ms(first_write_ - request_->received);
    double known = 0;
    for (const StageInfo& info : kStages) {
      if (info.in_ttft && info.stage != Stage::kDelivery) known += stages[info.stage];
    }
    stages[Stage::kDelivery] = std::max(0.0, stages[Stage::kTtft] - known);
  }
  stages[Stage::kTotal] = Ms(clock_->Now() - request_->received);
  stages[Stage::kMigration] = Ms(migration_);
  timing.decode_worker = decode_worker_;
  timing.migrations = migrations_;
  return timing;
}

Timing StreamMeter::OnEnd(const absl::Status& outcome, int attempts) {
  metrics_->requests(outcome.code()).Increment();
  if (attempts == 0) metrics_->rejected(outcome.code()).Increment();
  Timing timing = CurrentTiming();
  const StageTimes& stages = timing.stages;
  const absl::Time now = clock_->Now();
  metrics_->duration.Observe(stages[Stage::kTotal] / 1e3, request_->trace, now);
  const bool has_token = first_token_ != kNotYet;
  for (const StageInfo& info : kStages) {
    if (!has_token && !info.without_token) continue;
    if (info.stage == Stage::kMigration && migrations_ == 0) continue;
    // A client that left before its first message was written has no time to first token.
    if (info.stage == Stage::kTtft && first_write_ == kNotYet) continue;
    metrics_->stage(info.stage).Observe(stages[info.stage] / 1e3);
  }
  if (completion_tokens_ > 1) {
    metrics_->time_per_output_token.Observe(
        absl::ToDoubleSeconds(last_token_ - first_token_) / (completion_tokens_ - 1),
        request_->trace, now);
  }
  return timing;
}

}  // namespace tandem::router
