// The router's side of internal.v1.Decode: one stream per request, channels shared per worker.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "router/registry/cluster_view.h"
#include "router/stream/request.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace tandem::router {

// Receives one call's events, on gRPC's threads, one at a time.
class DecodeHandler {
 public:
  virtual ~DecodeHandler() = default;
  // Reading pauses after each event until ReadNext().
  virtual void OnEvent(TokenEvent event) = 0;
  // Last; also after Cancel().
  virtual void OnEnd(const absl::Status& status) = 0;
};

// Thread-safe. Lives until its OnEnd even if dropped.
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

// Thread-safe.
class DecodeClient {
 public:
  // Never blocks. `handler` is kept until its OnEnd. The first event is read at once.
  std::shared_ptr<DecodeCall> Start(const Assignment& assignment, const Request& request,
                                    std::shared_ptr<DecodeHandler> handler);
  // Drops the channels of workers that are not in `view`; their running calls go on.
  void Keep(const ClusterView& view);

 private:
  struct Peer {
    uint64_t incarnation;
    std::shared_ptr<grpc::Channel> channel;
  };
  std::shared_ptr<grpc::Channel> ChannelFor(const Assignment& assignment);

  absl::Mutex mutex_;
  std::map<std::string, Peer> peers_ ABSL_GUARDED_BY(mutex_);  // by worker id
};

}  // namespace tandem::router
