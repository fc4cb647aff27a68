// The stream of one request, from the queue to its last message: a state machine driven by the
// dispatcher, the decode worker's events, the client's writes and the deadline.
//
//   kQueued -> kDecoding -> kEnding -> kEnded
//      ^           |
//      +-----------+   worker full, lost or leaving; by way of kInDoubt, where two seem lost and
//                      one may live (loss.h), until more is known
//
// A worker lost after the first token loses nothing: another one gets the prompt and the answer so
// far, and goes on with the next token. It draws the same tokens, because a draw depends on seed,
// position and tokens only; and text, stop strings and messages go on, for they are made here.
//
// Thread-safe: every entry takes the stream's lock and never blocks under it. Lock order: stream,
// then dispatcher, registry or timers. Lives as long as someone will call it (dispatcher, decode
// call, sink).
//
// Back-pressure: one message at a time goes to the client; tokens that come meanwhile are merged
// into the next one (PendingResponse), and when that is full the decode call is not read until the
// client has taken the message.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "common/base/timer_queue.h"
#include "common/base/trace.h"
#include "router/dispatch/dispatcher.h"
#include "router/dispatch/suspect_prompts.h"
#include "router/metrics/router_metrics.h"
#include "router/request/access_log.h"
#include "router/request/decode_client.h"
#include "router/request/pending_response.h"
#include "router/request/request.h"
#include "router/request/running_streams.h"
#include "router/request/stream_meter.h"
#include "router/request/stream_sink.h"
#include "router/request/text_emitter.h"

namespace tandem::router {

// What all streams share; outlives them.
struct StreamContext {
  Dispatcher* dispatcher = nullptr;
  DecodeClient* decode_client = nullptr;
  RouterMetrics* metrics = nullptr;
  TimerQueue* timers = nullptr;
  Clock* clock = nullptr;
  const Registry* registry = nullptr;
  SuspectPrompts* suspects = nullptr;
  RunningStreams* running = nullptr;
  AccessLog* access_log = nullptr;
  bool migrate = true;        // after the first token too
  SpanSink* spans = nullptr;  // null: nothing is traced
};

class RequestStream : public Dispatchable, public std::enable_shared_from_this<RequestStream> {
 public:
  // `sink` lives until its Finish was called.
  RequestStream(Request request, TextEmitter text, StreamSink* sink, const StreamContext& context);

  // Joins the queue and sets the deadline's timer. Before that nothing calls the sink.
  void Begin();
  // The sink's Write has ended; false: the client is gone.
  void OnWritten(bool ok);
  // The client cancelled or went away.
  void OnClientGone();

  // A worker of the current route makes no progress: the stream goes on without it, unless it has
  // tokens from it that another one would have to take over, and the worker may still wake up.
  void OnWorkerStuck(const std::string& worker, bool lost);

  // Dispatchable.
  RoutablePrompt prompt() const override;
  void Start(const Route& route) override;
  void Fail(const absl::Status& status) override;

 private:
  enum class State { kQueued, kDecoding, kInDoubt, kEnding, kEnded };
  class AttemptHandler;

  void OnEvent(int attempt, TokenEvent event);
  void OnEnd(int attempt, const absl::Status& status);
  void OnDeadline();

  void Emit(TokenEvent event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The current attempt has ended so, without a finish reason.
  void OnAttemptOver(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Leaves the workers of the route; the call to them has ended so.
  void StopAttempt(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The worker was lost or did not take the request: ends the stream if it may go to no other.
  void TryElsewhere(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Tokens of the current attempt.
  int NewTokens() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return meter_.completion_tokens() - tokens_before_;
  }
  // kInDoubt: to another worker if it may, or it ends; or looks again where that is not known yet.
  void GoOn(RouterMetrics::RetryReason reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnLook(int attempt, RouterMetrics::RetryReason reason);
  void Blame() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Clear() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Requeue(RouterMetrics::RetryReason reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReadOn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetTimer(absl::Time when) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The outcome is known: stops the worker, lets the last message out, then finishes.
  void End(const absl::Status& status, FinishReason reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The client takes no more.
  void Abandon(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Metrics and log learn how the stream ended.
  void Account() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WritePending() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Request request_;
  const std::string name_;  // for logs
  const StreamContext context_;

  // Prompt and answer to go on behind; empty: the prompt alone. Not guarded: changes only while the
  // request is not in the queue, and is looked at (prompt()) only while it is.
  std::vector<int32_t> resumed_;

  absl::Mutex mutex_;
  State state_ ABSL_GUARDED_BY(mutex_) = State::kQueued;
  StreamSink* sink_ ABSL_GUARDED_BY(mutex_);
  TextEmitter text_ ABSL_GUARDED_BY(mutex_);
  StreamMeter meter_ ABSL_GUARDED_BY(mutex_);
  Dispatcher::Ticket ticket_ ABSL_GUARDED_BY(mutex_) = 0;
  TimerQueue::Id timer_ ABSL_GUARDED_BY(mutex_) = 0;
  // The current attempt; events of earlier ones are ignored.
  int attempt_ ABSL_GUARDED_BY(mutex_) = 0;
  Route route_ ABSL_GUARDED_BY(mutex_);
  std::vector<int32_t> generated_ ABSL_GUARDED_BY(mutex_);  // by all attempts
  int tokens_before_ ABSL_GUARDED_BY(mutex_) = 0;           // the current attempt
  std::shared_ptr<DecodeCall> call_ ABSL_GUARDED_BY(mutex_);
  Retries retries_ ABSL_GUARDED_BY(mutex_);
  std::string last_loss_ ABSL_GUARDED_BY(mutex_);  // for the status, if no other try follows
  std::string loss_before_ ABSL_GUARDED_BY(mutex_);
  absl::Time doubt_until_ ABSL_GUARDED_BY(mutex_);
  absl::Time waiting_since_ ABSL_GUARDED_BY(mutex_);
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
  // Messages to the client.
  PendingResponse pending_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  int cached_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  DraftCounts drafts_ ABSL_GUARDED_BY(mutex_);
  absl::Status outcome_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::router
