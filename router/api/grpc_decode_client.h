// DecodeClient over internal.v1.Decode: one gRPC stream per request, channels shared per worker.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "router/request/decode_client.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace tandem::router {

// Handlers are called on gRPC's threads.
class GrpcDecodeClient : public DecodeClient {
 public:
  std::shared_ptr<DecodeCall> Start(const Route& route, const Request& request,
                                    std::shared_ptr<DecodeHandler> handler) override;
  // Drops the channels of workers that are not in `view`.
  void Keep(const ClusterView& view) override;

 private:
  struct Peer {
    uint64_t incarnation;
    std::shared_ptr<grpc::Channel> channel;
  };
  std::shared_ptr<grpc::Channel> ChannelFor(const Route& route);

  absl::Mutex mutex_;
  std::map<std::string, Peer> peers_ ABSL_GUARDED_BY(mutex_);  // by worker id
};

}  // namespace tandem::router
