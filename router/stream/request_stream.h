// The stream of one request, from the queue to its last message: a state machine driven by the
// dispatcher, the decode worker's events and the client's writes.
//
//   kQueued -> kDecoding -> kEnding -> kEnded
//      ^           |
//      +-----------+   worker lost or full before the first token
//
// Thread-safe: every entry takes the stream's lock and never blocks under it. Lock order: stream,
// then dispatcher or registry. Lives as long as someone will call it (dispatcher, decode call,
// sink).
//
// Back-pressure: one message at a time goes to the client; tokens that come meanwhile are merged
// into the next one, and when that holds kMaxPendingTokens or kMaxPendingTextBytes the decode call
// is not read until the client has taken the message.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "router/router_metrics.h"
#include "router/stream/decode_client.h"
#include "router/stream/dispatcher.h"
#include "router/stream/request.h"
#include "router/stream/text_emitter.h"

namespace tandem::router {

// The client's side. Called under the stream's lock: must not call back, must not block.
class StreamSink {
 public:
  virtual ~StreamSink() = default;
  // The next Write or Finish comes only after RequestStream::OnWritten.
  virtual void Write(const StreamUpdate& update) = 0;
  // Last call.
  virtual void Finish(const absl::Status& status) = 0;
  // Makes an unfinished Write fail soon. Finish still follows.
  virtual void Abort() = 0;
};

// What all streams share; outlives them.
struct StreamContext {
  Dispatcher* dispatcher = nullptr;
  DecodeClient* decode_client = nullptr;
  RouterMetrics* metrics = nullptr;
  Clock* clock = nullptr;
};

class RequestStream : public Dispatchable, public std::enable_shared_from_this<RequestStream> {
 public:
  static constexpr size_t kMaxPendingTokens = 256;
  static constexpr size_t kMaxPendingTextBytes = 64 << 10;
  // How often a request whose worker was lost is sent to another one.
  static constexpr int kMaxLost = 3;

  // `sink` lives until its Finish was called.
  RequestStream(Request request, TextEmitter text, StreamSink* sink, const StreamContext& context);

  // Joins the queue.
  void Begin();
  // The sink's Write has ended; false: the client is gone.
  void OnWritten(bool ok);
  // The client cancelled or went away.
  void OnClientGone();
  // The request's deadline has passed. False: the stream still waits for the client to take a
  // message; a second call gives up on that.
  bool OnDeadline();

  // Dispatchable.
  const Request& request() const override { return request_; }
  void Start(const Assignment& assignment) override;
  void Fail(const absl::Status& status) override;

 private:
  enum class State { kQueued, kDecoding, kEnding, kEnded };
  class AttemptHandler;

  void OnEvent(int attempt, TokenEvent event);
  void OnEnd(int attempt, const absl::Status& status);

  void Emit(TokenEvent event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RecordTokens(size_t count) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Reroute(Refusal::Kind kind) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReadOn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The outcome is known: stops the worker, lets the last message out, then finishes.
  void End(const absl::Status& status, FinishReason reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WritePending() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RecordEnd() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  RequestTiming Timing() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool HasPending() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Request request_;
  const StreamContext context_;

  absl::Mutex mutex_;
  State state_ ABSL_GUARDED_BY(mutex_) = State::kQueued;
  StreamSink* sink_ ABSL_GUARDED_BY(mutex_);
  TextEmitter text_ ABSL_GUARDED_BY(mutex_);
  Dispatcher::Ticket ticket_ ABSL_GUARDED_BY(mutex_) = 0;
  // The current attempt; events of earlier ones are ignored.
  int attempt_ ABSL_GUARDED_BY(mutex_) = 0;
  Assignment assignment_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<DecodeCall> call_ ABSL_GUARDED_BY(mutex_);
  std::vector<Refusal> refusals_ ABSL_GUARDED_BY(mutex_);
  int lost_ ABSL_GUARDED_BY(mutex_) = 0;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
  // Messages to the client.
  StreamUpdate pending_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status outcome_ ABSL_GUARDED_BY(mutex_);
  int completion_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  int cached_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  // Times.
  WorkerTiming worker_timing_ ABSL_GUARDED_BY(mutex_);
  absl::Time waiting_since_ ABSL_GUARDED_BY(mutex_);
  absl::Time started_ ABSL_GUARDED_BY(mutex_);  // sent to the decode worker
  absl::Time first_token_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Time last_token_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Time first_write_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

}  // namespace tandem::router
