// What one stream measures of itself: when it reached which point, its Timing, its spans, and its
// part of the router's metrics.
//
// Not thread-safe: part of a RequestStream.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/base/token_event.h"
#include "common/base/trace.h"
#include "router/metrics/router_metrics.h"
#include "router/policy/routing_policy.h"
#include "router/request/request.h"

namespace tandem::router {

class StreamMeter {
 public:
  // All outlive this; `spans` may be null.
  StreamMeter(const Request* request, RouterMetrics* metrics, SpanSink* spans, Clock* clock);

  // The request went to the workers of `route`; again after a retry.
  void OnStart(const Route& route);
  // It came back from there, or ended, so.
  void OnStop(absl::StatusCode code);
  // The worker's tokens are not read, or are read again, because the client is slow.
  void OnPause();
  void OnResume();
  // It lost its decode worker after the first token and goes on elsewhere.
  void OnMigration();
  // What the decode worker says beside its tokens.
  void OnWorkerTiming(Timing timing);
  // `count` tokens came, of a prompt of which `cached_tokens` were cached.
  void OnTokens(size_t count, int cached_tokens);
  // A message of the answer goes to the client.
  void OnWrite();
  // Records what the whole request took, and how it ended after so many decode workers; as of then.
  Timing OnEnd(const absl::Status& outcome, int attempts);
  // What the call to the workers of OnStart carries.
  const TraceContext& call() const { return trace_ != nullptr ? call_ : request_->trace; }
  // The request's spans; null: it has none.
  RequestTrace* trace() { return trace_.get(); }

  int completion_tokens() const { return completion_tokens_; }
  // As of now.
  Timing CurrentTiming() const;

 private:
  static constexpr absl::Time kNotYet = absl::InfinitePast();

  const Request* const request_;
  RouterMetrics* const metrics_;
  Clock* const clock_;
  const std::unique_ptr<RequestTrace> trace_;
  TraceContext call_;
  int tokens_before_ = 0;  // the current call
  std::string decode_worker_;
  int predicted_cached_tokens_ = 0;
  Timing worker_;
  Timing before_;  // `worker_` when the last migration began
  int migrations_ = 0;
  absl::Duration migration_;
  absl::Time left_ = kNotYet;         // a migration runs since
  absl::Time waits_since_ = kNotYet;  // for a token: the last one, or the end of a pause behind it
  int completion_tokens_ = 0;
  size_t cached_tokens_ = 0;  // as the first token's worker said
  absl::Time queued_since_;
  absl::Time started_ = kNotYet;  // sent to the decode worker, the last time
  absl::Duration queued_;         // before each of the workers that it was sent to
  absl::Duration failed_;         // with those that gave no token
  absl::Time paused_at_ = kNotYet;
  absl::Duration paused_;
  absl::Time first_token_ = kNotYet;
  absl::Time last_token_ = kNotYet;
  absl::Time first_write_ = kNotYet;
};

}  // namespace tandem::router
