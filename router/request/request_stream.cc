// Four parties call in from threads of their own, and each may come after the stream has moved on.
// Three rules keep that simple. Whatever arrives for another state than it was meant for is
// dropped. Events carry the number of the attempt they belong to, so that a decode call which was
// given up cannot speak for its successor. And nothing but Advance() calls the sink, so that the
// order "writes, then one Finish" holds whoever ends the stream.
#include "router/request/request_stream.h"

#include <optional>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/block_hash.h"
#include "common/base/refusal.h"
#include "common/base/status.h"

namespace tandem::router {
namespace {

// After the deadline, how long a client that is not reading has to take its last message.
constexpr absl::Duration kLastMessageGrace = absl::Seconds(2);
// How long a request that lost two workers waits for a sign of life from them, and how often it
// looks. A worker that is stopped for a moment reports as soon as it goes on.
constexpr absl::Duration kLongestDoubt = absl::Seconds(2);
constexpr absl::Duration kLookAgain = absl::Milliseconds(100);
// A request that a worker has drawn so many tokens of is not what killed it.
constexpr int kInnocentTokens = 32;

// By which a prompt is known again.
Hash128 Fingerprint(const Request& request) { return ChainBlockHash(Hash128{}, request.tokens); }

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
    : request_(std::move(request)),
      name_(LogName(request_)),
      context_(context),
      sink_(sink),
      text_(std::move(text)),
      meter_(&request_, context.metrics, context.spans, context.clock) {}

RoutablePrompt RequestStream::prompt() const {
  return {name_,
          resumed_.empty() ? request_.tokens : resumed_,
          request_.cache_salt,
          request_.priority,
          request_.received,
          request_.deadline};
}

void RequestStream::Begin() {
  absl::MutexLock lock(&mutex_);
  if (state_ != State::kQueued) return;
  if (!context_.suspects->empty() &&
      context_.suspects->IsPoison(Fingerprint(request_), *context_.registry->view())) {
    context_.metrics->poison_refusals.Increment();
    return End(FailedPrecondition(
                   "{} workers died with this prompt; it is refused for {} after the last one",
                   SuspectPrompts::kMaxDeaths, absl::FormatDuration(context_.suspects->memory())),
               FinishReason::kAbort);
  }
  waiting_since_ = context_.clock->Now();
  const absl::Status queued = context_.dispatcher->Submit(shared_from_this(), &ticket_);
  if (!queued.ok()) return End(queued, FinishReason::kAbort);
  SetTimer(request_.deadline);
}

void RequestStream::SetTimer(absl::Time when) {
  // The timer must not keep a stream alive that nobody else knows any more.
  timer_ = context_.timers->Set(when, [weak = weak_from_this()] {
    if (const std::shared_ptr<RequestStream> self = weak.lock()) self->OnDeadline();
  });
}

void RequestStream::Start(const Route& route) {
  absl::MutexLock lock(&mutex_);
  if (state_ != State::kQueued) return;
  state_ = State::kDecoding;
  route_ = route;
  route_.may_lose = retries_.may_lose();
  tokens_before_ = meter_.completion_tokens();
  meter_.OnStart(route_);
  context_.running->Add(route_.decode.id, this, weak_from_this());
  if (!route_.prefill.empty()) {
    context_.running->Add(route_.prefill.front().id, this, weak_from_this());
  }
  ++attempt_;
  paused_ = false;
  call_ =
      context_.decode_client->Start(route_, request_, generated_, meter_.call(),
                                    std::make_shared<AttemptHandler>(shared_from_this(), attempt_));
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
  if (meter_.completion_tokens() == 0) cached_tokens_ = event.cached_tokens;
  drafts_.Add(event.drafts);
  if (event.timing.has_value()) meter_.OnWorkerTiming(std::move(*event.timing));
  const FinishReason reason = event.finish_reason;
  // A stop string may end the answer in the middle of an event, and a worker may have drawn more
  // than the client asked for: what lies behind is dropped, and its logprobs with it.
  std::string text;
  size_t taken = 0;
  bool stopped = false;
  while (taken < event.token_ids.size() && !stopped &&
         meter_.completion_tokens() + static_cast<int>(taken) < request_.max_tokens) {
    TextEmitter::Result result = text_.Push(event.token_ids[taken++]);
    text += result.text;
    stopped = result.stopped;
  }
  event.token_ids.resize(taken);
  generated_.insert(generated_.end(), event.token_ids.begin(), event.token_ids.end());
  if (event.logprobs.size() > taken) event.logprobs.resize(taken);
  meter_.OnTokens(taken, cached_tokens_);
  pending_.Append(std::move(event), text);
  if (stopped) return End(absl::OkStatus(), FinishReason::kStop);
  // The status that says why a request was aborted comes with the end of the call.
  if (reason == FinishReason::kNone || reason == FinishReason::kAbort) return;
  pending_.AppendText(text_.Flush());
  // The worker is done by itself: the call ends, nothing is left to cancel.
  call_->ReadToEnd();
  call_.reset();
  End(absl::OkStatus(), reason);
}

void RequestStream::ReadOn() {
  if (state_ != State::kDecoding) return;
  paused_ = pending_.full();
  if (paused_) return meter_.OnPause();
  meter_.OnResume();
  call_->ReadNext();
}

void RequestStream::OnEnd(int attempt, const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (attempt != attempt_ || state_ != State::kDecoding) return;
  OnAttemptOver(status);
}

void RequestStream::OnWorkerStuck(const std::string& worker, bool lost) {
  absl::MutexLock lock(&mutex_);
  if (state_ != State::kDecoding || (NewTokens() > 0 && !lost)) return;
  absl::Status status = Unavailable("worker '{}' makes no progress", worker);
  if (worker != route_.decode.id) {
    if (route_.prefill.empty() || worker != route_.prefill.front().id || NewTokens() > 0) return;
    status = WithRefusal(status, {.reason = Refusal::Reason::kPrefill, .lost = 1});
  }
  call_->Cancel();
  OnAttemptOver(status);
}

void RequestStream::OnAttemptOver(const absl::Status& status) {
  const std::string& worker = route_.decode.id;
  const int tokens = meter_.completion_tokens();
  const bool lost = MayBeLost(status);
  if (status.ok()) {
    return End(Unavailable("decode worker '{}' ended the stream without a finish reason after {} "
                           "tokens",
                           worker, tokens),
               FinishReason::kAbort);
  }
  if ((lost || RefusalOf(status).has_value()) && (tokens == 0 || context_.migrate)) {
    return TryElsewhere(status);
  }
  if (lost) {
    return End(Unavailable("decode worker '{}' was lost after {} tokens: {}", worker, tokens,
                           MessageOf(status)),
               FinishReason::kAbort);
  }
  End(absl::Status(status.code(), fmt::format("decode worker '{}', after {} tokens: {}", worker,
                                              tokens, MessageOf(status))),
      FinishReason::kAbort);
}

void RequestStream::TryElsewhere(const absl::Status& status) {
  const std::string& worker = route_.decode.id;
  const absl::Time now = context_.clock->Now();
  if (NewTokens() >= kInnocentTokens) {
    retries_ = {};
    last_loss_.clear();
  }
  const std::optional<Refusal> refusal = RefusalOf(status);
  if (refusal.has_value()) {
    retries_.AddRefused(route_, *refusal, now);
  } else {
    spdlog::warn("request {}: decode worker {} was lost after {} tokens: {}", name_, worker,
                 meter_.completion_tokens(), MessageOf(status));
    retries_.AddLost(route_, now);
  }
  Blame();
  if (!retries_.last_losses().empty()) {
    loss_before_ = last_loss_.empty() ? "" : "; before that " + last_loss_;
    last_loss_ = fmt::format("at decode worker '{}' after {} tokens: {}", worker,
                             meter_.completion_tokens(), MessageOf(status));
  }
  // A full cluster is one long wait; after a loss, or tokens, waiting begins anew.
  if (!refusal.has_value() || NewTokens() > 0) waiting_since_ = now;
  StopAttempt(status);
  call_.reset();
  state_ = State::kInDoubt;
  doubt_until_ = now + kLongestDoubt;
  GoOn(refusal.has_value() ? RouterMetrics::RetryReason::kWorkerFull
                           : RouterMetrics::RetryReason::kWorkerLost);
}

void RequestStream::Blame() {
  if (NewTokens() >= kInnocentTokens) return;
  for (const Loss& loss : retries_.last_losses()) {
    context_.suspects->NoteLoss(Fingerprint(request_), loss);
  }
}

void RequestStream::GoOn(RouterMetrics::RetryReason reason) {
  retries_.LookFor(*context_.registry->view());
  if (retries_.may_try_again()) return Requeue(reason);
  const absl::Time now = context_.clock->Now();
  if (retries_.in_doubt() && now < doubt_until_) {
    context_.timers->Set(now + kLookAgain, [weak = weak_from_this(), attempt = attempt_, reason] {
      if (const std::shared_ptr<RequestStream> self = weak.lock()) self->OnLook(attempt, reason);
    });
    return;
  }
  const std::string what =
      retries_.broken_too_often()
          ? fmt::format("{} calls to workers broke with this request", retries_.broken())
          : fmt::format("{} workers were lost with this request", retries_.lost());
  End(Unavailable("{}, the last time {}{}", what, last_loss_, loss_before_), FinishReason::kAbort);
}

void RequestStream::OnLook(int attempt, RouterMetrics::RetryReason reason) {
  absl::MutexLock lock(&mutex_);
  if (attempt == attempt_ && state_ == State::kInDoubt) GoOn(reason);
}

void RequestStream::Clear() {
  if (!context_.suspects->empty()) context_.suspects->NoteServed(Fingerprint(request_));
}

void RequestStream::Requeue(RouterMetrics::RetryReason reason) {
  context_.metrics->retries(reason).Increment();
  if (meter_.completion_tokens() > 0) {
    meter_.OnMigration();
    resumed_ = request_.tokens;
    resumed_.insert(resumed_.end(), generated_.begin(), generated_.end());
  }
  state_ = State::kQueued;
  context_.dispatcher->Requeue(shared_from_this(), ticket_, waiting_since_, retries_);
}

void RequestStream::StopAttempt(const absl::Status& status) {
  meter_.OnStop(status.code());
  context_.running->Remove(route_.decode.id, this);
  if (!route_.prefill.empty()) context_.running->Remove(route_.prefill.front().id, this);
}

void RequestStream::End(const absl::Status& status, FinishReason reason) {
  if (state_ == State::kEnding || state_ == State::kEnded) return;
  if (state_ == State::kDecoding) StopAttempt(status);
  if (status.ok()) Clear();
  state_ = State::kEnding;
  outcome_ = status;
  if (ticket_ != 0) context_.dispatcher->Ended(ticket_);
  if (call_ != nullptr) call_->Cancel();
  call_.reset();
  // A stream that has begun ends with a message that says how; before that the status says it all.
  if (status.ok() || meter_.completion_tokens() > 0) pending_.SetFinishReason(reason);
  Advance();
}

void RequestStream::Advance() {
  if (writing_ || state_ == State::kEnded) return;
  if (!pending_.empty()) return WritePending();
  if (state_ != State::kEnding) return;
  state_ = State::kEnded;
  context_.timers->Cancel(timer_);
  Account();
  sink_->Finish(outcome_);
  sink_ = nullptr;
}

void RequestStream::Account() {
  AccessRecord record;
  record.timing = meter_.OnEnd(outcome_, attempt_);
  record.id = request_.id;
  record.session = request_.session_id;
  record.key_name = request_.key_name;
  record.status = outcome_;
  record.prompt_tokens = static_cast<int>(request_.tokens.size());
  record.cached_tokens = cached_tokens_;
  record.completion_tokens = meter_.completion_tokens();
  record.drafts = drafts_;
  record.attempts = attempt_;
  if (RequestTrace* trace = meter_.trace(); trace != nullptr) {
    trace->End(context_.clock->Now(), outcome_.code(), AccessFields(record));
  }
  record.trace = request_.trace;
  context_.access_log->Write(record);
}

void RequestStream::WritePending() {
  GenerateResponse response = pending_.Take();
  response.prompt_tokens = static_cast<int>(request_.tokens.size());
  response.cached_tokens = cached_tokens_;
  response.completion_tokens = meter_.completion_tokens();
  response.drafts = drafts_;
  if (!response.computed_tokens.has_value()) meter_.OnWrite();
  if (response.finish_reason != FinishReason::kNone) response.timing = meter_.CurrentTiming();
  writing_ = true;
  sink_->Write(response);
}

void RequestStream::OnWritten(bool ok) {
  absl::MutexLock lock(&mutex_);
  writing_ = false;
  if (!ok) Abandon(absl::CancelledError("the client went away"));
  Advance();
  if (paused_ && state_ == State::kDecoding) ReadOn();
}

void RequestStream::OnClientGone() {
  absl::MutexLock lock(&mutex_);
  if (state_ == State::kEnded) return;
  Abandon(absl::CancelledError("the client cancelled the request"));
}

void RequestStream::Abandon(const absl::Status& why) {
  // An answer whose end nobody gets was not served, though its last token was drawn.
  if (state_ == State::kEnding && !pending_.empty() && outcome_.ok()) outcome_ = why;
  pending_.Clear();
  End(why, FinishReason::kNone);
}

void RequestStream::OnDeadline() {
  absl::MutexLock lock(&mutex_);
  if (state_ == State::kEnded) return;
  if (state_ == State::kEnding) {
    // The stream waits for nothing but the client, which has had its grace.
    if (outcome_.ok() && !pending_.empty()) {
      outcome_ = DeadlineExceeded("the deadline passed before the client had taken the answer");
    }
    if (sink_ != nullptr) sink_->Abort();
    return;
  }
  End(DeadlineExceeded("the deadline passed {} after the request came, with {} tokens produced{}",
                       absl::FormatDuration(context_.clock->Now() - request_.received),
                       meter_.completion_tokens(),
                       state_ == State::kQueued ? "; it still waited for a worker" : ""),
      FinishReason::kAbort);
  if (state_ != State::kEnded) SetTimer(context_.clock->Now() + kLastMessageGrace);
}

}  // namespace tandem::router
