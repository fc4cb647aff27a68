// How the router reaches decode workers: the seam below RequestStream. The cluster's is gRPC
// (router/api/grpc_decode_client.h); a test may hand events over within the process.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"

#include "common/base/token_event.h"
#include "common/base/trace.h"
#include "router/policy/routing_policy.h"
#include "router/registry/cluster_view.h"
#include "router/request/request.h"

namespace tandem::router {

// Receives one call's events, one at a time. Never called from within Start, ReadNext, ReadToEnd or
// Cancel: the caller of those holds the lock that the handler needs.
class DecodeHandler {
 public:
  virtual ~DecodeHandler() = default;
  // Reading pauses after each event until ReadNext().
  virtual void OnEvent(TokenEvent event) = 0;
  // Last; also after Cancel().
  virtual void OnEnd(const absl::Status& status) = 0;
};

// Thread-safe; never blocks. Lives until its OnEnd even if dropped.
class DecodeCall {
 public:
  virtual ~DecodeCall() = default;
  // At most once per event.
  virtual void ReadNext() = 0;
  // Instead of ReadNext after the last event: lets the worker end the call by itself. Further
  // events are not handed out, they cancel the call.
  virtual void ReadToEnd() = 0;
  // Idempotent. No event is handed out whose reading has not ended by now.
  virtual void Cancel() = 0;
};

// Thread-safe; never blocks.
class DecodeClient {
 public:
  virtual ~DecodeClient() = default;
  // `handler` is kept until its OnEnd. The first event is read at once. `generated`: tokens that
  // came from an earlier call of the same request; the worker goes on behind them. `trace`: the
  // call's place in its trace, if it has one.
  virtual std::shared_ptr<DecodeCall> Start(const Route& route, const Request& request,
                                            std::span<const int32_t> generated,
                                            const TraceContext& trace,
                                            std::shared_ptr<DecodeHandler> handler) = 0;
  // Forgets what was kept for workers that are not in `view`; their running calls go on.
  virtual void Keep(const ClusterView& view) = 0;
};

}  // namespace tandem::router
