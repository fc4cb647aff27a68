#include "router/stream/request_stream.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

// Whether a status may mean that the worker, not the request, is at fault.
bool MayBeLost(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnimplemented:
      return true;
    default:
      return false;
  }
}

std::string Text(const absl::Status& status) {
  return std::string(status.message().data(), status.message().size());
}

double Ms(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

template <typename T>
void Append(std::vector<T> from, std::vector<T>* to) {
  to->insert(to->end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

}  // namespace

// Ties a decode call's events to the attempt they belong to, and keeps the stream alive.
class RequestStream::AttemptHandler : public DecodeHandler {
 public:
  AttemptHandler(std::shared_ptr<RequestStream> stream, int attempt)
      : stream_(std::move(stream)), attempt_(attempt) {}
  void OnEvent(TokenEvent event) override { stream_->OnEvent(attempt_, std::move(event)); }
  void OnEnd(const absl::Status& status) override { stream_->OnEnd(attempt_, status); }

 private:
  const std::shared_ptr<RequestStream> stream_;
  const int attempt_;
};

RequestStream::RequestStream(Request request, TextEmitter text, StreamSink* sink,
                             const StreamContext& context)
    : request_(std::move(request)), context_(context), sink_(sink), text_(std::move(text)) {}

void RequestStream::Begin() {
  absl::MutexLock lock(&mutex_);
  if (state_ != State::kQueued) return;
  waiting_since_ = context_.clock->Now();
  const absl::Status queued = context_.dispatcher->Submit(shared_from_this(), &ticket_);
  if (!queued.ok()) End(queued, FinishReason::kAbort);
}

void RequestStream::Start(const Assignment& assignment) {
  absl::MutexLock lock(&mutex_);
  if (state_ != State::kQueued) return;
  state_ = State::kDecoding;
  assignment_ = assignment;
  started_ = context_.clock->Now();
  ++attempt_;
  paused_ = false;
  context_.metrics->running.Increment();
  call_ = context_.decode_client->Start(
      assignment_, request_, std::make_shared<AttemptHandler>(shared_from_this(), attempt_));
}

void RequestStream::Fail(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (state_ == State::kQueued) End(status, FinishReason::kAbort);
}

void RequestStream::OnEvent(int attempt, TokenEvent event) {
  absl::MutexLock lock(&mutex_);
  if (attempt != attempt_ || state_ != State::kDecoding) return;
  Emit(std::move(event));
  Advance();
  ReadOn();
}

void RequestStream::Emit(TokenEvent event) {
  cached_tokens_ = event.cached_tokens;
  if (event.timing.has_value()) worker_timing_ = std::move(*event.timing);
  Append(std::move(event.prompt_logprobs), &pending_.prompt_logprobs);
  size_t taken = 0;
  bool stopped = false;
  while (taken < event.token_ids.size() && !stopped &&
         completion_tokens_ + static_cast<int>(taken) < request_.max_tokens) {
    TextEmitter::Result result = text_.Push(event.token_ids[taken++]);
    pending_.text += result.text;
    stopped = result.stopped;
  }
  event.token_ids.resize(taken);
  if (event.logprobs.size() > taken) event.logprobs.resize(taken);
  RecordTokens(taken);
  Append(std::move(event.token_ids), &pending_.token_ids);
  Append(std::move(event.logprobs), &pending_.logprobs);
  if (stopped) return End(absl::OkStatus(), FinishReason::kStop);
  if (event.finish_reason == FinishReason::kNone) return;
  if (event.finish_reason == FinishReason::kAbort) {
    // The status that says why comes with the end of the call.
    return;
  }
  pending_.text += text_.Flush();
  // The worker is done by itself: the call ends, nothing is left to cancel.
  call_->ReadToEnd();
  call_.reset();
  End(absl::OkStatus(), event.finish_reason);
}

void RequestStream::RecordTokens(size_t count) {
  if (count == 0) return;
  const absl::Time now = context_.clock->Now();
  RouterMetrics& metrics = *context_.metrics;
  if (completion_tokens_ == 0) {
    first_token_ = now;
    metrics.predicted_hit_tokens.Increment(assignment_.predicted_cached_tokens);
    metrics.actual_hit_tokens.Increment(cached_tokens_);
    metrics.prompt_tokens.Increment(static_cast<double>(request_.tokens.size()));
  } else {
    const double gap = absl::ToDoubleSeconds(now - last_token_) / static_cast<double>(count);
    for (size_t i = 0; i < count; ++i) metrics.inter_token.Observe(gap);
  }
  last_token_ = now;
  completion_tokens_ += static_cast<int>(count);
  metrics.generation_tokens.Increment(static_cast<double>(count));
}

void RequestStream::ReadOn() {
  if (state_ != State::kDecoding) return;
  paused_ = pending_.token_ids.size() >= kMaxPendingTokens ||
            pending_.text.size() >= kMaxPendingTextBytes;
  if (!paused_) call_->ReadNext();
}

void RequestStream::OnEnd(int attempt, const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (attempt != attempt_ || state_ != State::kDecoding) return;
  const std::string& worker = assignment_.decode_worker;
  if (status.ok()) {
    return End(Unavailable("decode worker '{}' ended the stream without a finish reason after {} "
                           "tokens",
                           worker, completion_tokens_),
               FinishReason::kAbort);
  }
  if (completion_tokens_ == 0) {
    if (absl::IsResourceExhausted(status)) return Reroute(Refusal::Kind::kFull);
    if (MayBeLost(status) && lost_ < kMaxLost) {
      spdlog::warn("request {}: decode worker {} failed before the first token: {}", request_.id,
                   worker, Text(status));
      ++lost_;
      return Reroute(Refusal::Kind::kLost);
    }
    if (MayBeLost(status)) {
      return End(Unavailable("{} workers failed before the first token, the last one decode worker "
                             "'{}': {}",
                             lost_ + 1, worker, Text(status)),
                 FinishReason::kAbort);
    }
  } else if (MayBeLost(status)) {
    return End(Unavailable("decode worker '{}' was lost after {} tokens: {}", worker,
                           completion_tokens_, Text(status)),
               FinishReason::kAbort);
  }
  End(absl::Status(status.code(), fmt::format("decode worker '{}', after {} tokens: {}", worker,
                                              completion_tokens_, Text(status))),
      FinishReason::kAbort);
}

void RequestStream::Reroute(Refusal::Kind kind) {
  const absl::Time now = context_.clock->Now();
  std::erase_if(refusals_, [&](const Refusal& r) { return r.worker == assignment_.decode_worker; });
  refusals_.push_back(
      {kind, assignment_.decode_worker, assignment_.incarnation, assignment_.reported, now});
  // A full cluster is one long wait; after a loss waiting begins anew.
  if (kind == Refusal::Kind::kLost) waiting_since_ = now;
  context_.metrics
      ->retries(kind == Refusal::Kind::kLost ? RouterMetrics::RetryReason::kWorkerLost
                                             : RouterMetrics::RetryReason::kWorkerFull)
      .Increment();
  context_.metrics->running.Decrement();
  state_ = State::kQueued;
  call_.reset();
  context_.dispatcher->Requeue(shared_from_this(), ticket_, waiting_since_, refusals_);
}

void RequestStream::End(const absl::Status& status, FinishReason reason) {
  if (state_ == State::kEnding || state_ == State::kEnded) return;
  if (state_ == State::kDecoding) context_.metrics->running.Decrement();
  state_ = State::kEnding;
  outcome_ = status;
  if (ticket_ != 0) context_.dispatcher->Ended(ticket_);
  if (call_ != nullptr) call_->Cancel();
  call_.reset();
  // A stream that has begun ends with a message that says how; before that the status says it all.
  if (status.ok() || completion_tokens_ > 0) pending_.finish_reason = reason;
  Advance();
}

bool RequestStream::HasPending() const {
  return !pending_.token_ids.empty() || !pending_.text.empty() ||
         pending_.finish_reason != FinishReason::kNone;
}

void RequestStream::Advance() {
  if (writing_ || state_ == State::kEnded) return;
  if (HasPending()) return WritePending();
  if (state_ != State::kEnding) return;
  state_ = State::kEnded;
  RecordEnd();
  sink_->Finish(outcome_);
  sink_ = nullptr;
}

void RequestStream::WritePending() {
  StreamUpdate update = std::exchange(pending_, {});
  update.prompt_tokens = static_cast<int>(request_.tokens.size());
  update.cached_tokens = cached_tokens_;
  update.completion_tokens = completion_tokens_;
  if (first_write_ == absl::InfinitePast()) {
    first_write_ = context_.clock->Now();
    context_.metrics->ttft.Observe(absl::ToDoubleSeconds(first_write_ - request_.received));
  }
  if (update.finish_reason != FinishReason::kNone) update.timing = Timing();
  writing_ = true;
  sink_->Write(update);
}

void RequestStream::OnWritten(bool ok) {
  absl::MutexLock lock(&mutex_);
  writing_ = false;
  if (!ok) {
    pending_ = {};
    End(absl::CancelledError("the client went away"), FinishReason::kNone);
  }
  Advance();
  if (paused_ && state_ == State::kDecoding) ReadOn();
}

void RequestStream::OnClientGone() {
  absl::MutexLock lock(&mutex_);
  if (state_ == State::kEnded) return;
  pending_ = {};
  End(absl::CancelledError("the client cancelled the request"), FinishReason::kNone);
}

bool RequestStream::OnDeadline() {
  absl::MutexLock lock(&mutex_);
  if (state_ == State::kEnded) return true;
  if (state_ == State::kEnding) {
    sink_->Abort();
    return true;
  }
  End(DeadlineExceeded("the deadline passed {} after the request came, with {} tokens produced{}",
                       absl::FormatDuration(context_.clock->Now() - request_.received),
                       completion_tokens_,
                       state_ == State::kQueued ? "; it still waited for a worker" : ""),
      FinishReason::kAbort);
  return state_ == State::kEnded;
}

RequestTiming RequestStream::Timing() const {
  RequestTiming timing;
  timing.worker = worker_timing_;
  timing.tokenize = Ms(request_.tokenize_time);
  timing.queue =
      Ms(started_ - request_.received - request_.tokenize_time) + worker_timing_.decode_queue;
  timing.ttft = Ms(first_write_ - request_.received);
  timing.total = Ms(context_.clock->Now() - request_.received);
  timing.decode_worker = assignment_.decode_worker;
  return timing;
}

void RequestStream::RecordEnd() {
  RouterMetrics& metrics = *context_.metrics;
  metrics.requests(outcome_.code()).Increment();
  const RequestTiming timing = Timing();
  metrics.duration.Observe(timing.total / 1e3);
  metrics.stage(Stage::kTokenize).Observe(timing.tokenize / 1e3);
  metrics.stage(Stage::kTotal).Observe(timing.total / 1e3);
  if (first_token_ == absl::InfinitePast()) return;
  metrics.stage(Stage::kQueue).Observe(timing.queue / 1e3);
  metrics.stage(Stage::kPrefillQueue).Observe(timing.worker.prefill_queue / 1e3);
  metrics.stage(Stage::kPrefill).Observe(timing.worker.prefill / 1e3);
  metrics.stage(Stage::kKvTransferTotal).Observe(timing.worker.kv_transfer_total / 1e3);
  metrics.stage(Stage::kKvTransferExposed).Observe(timing.worker.kv_transfer_exposed / 1e3);
  metrics.stage(Stage::kFirstDecodeStep).Observe(timing.worker.first_decode_step / 1e3);
  if (first_write_ != absl::InfinitePast()) {
    metrics.stage(Stage::kTtft).Observe(timing.ttft / 1e3);
  }
  if (completion_tokens_ > 1) {
    metrics.time_per_output_token.Observe(absl::ToDoubleSeconds(last_token_ - first_token_) /
                                          (completion_tokens_ - 1));
  }
}

}  // namespace tandem::router
