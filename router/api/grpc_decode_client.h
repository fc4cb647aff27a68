// DecodeClient over internal.v1.Decode: one gRPC stream per request, channels shared per worker.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/rpc/cluster_credentials.h"
#include "router/request/decode_client.h"

namespace grpc {
class Channel;
}  // namespace grpc

namespace tandem::router {

// Handlers are called on gRPC's threads.
class GrpcDecodeClient : public DecodeClient {
 public:
  explicit GrpcDecodeClient(std::shared_ptr<const ClusterCredentials> credentials)
      : credentials_(std::move(credentials)) {}

  std::shared_ptr<DecodeCall> Start(const Route& route, const Request& request,
                                    std::span<const int32_t> generated, const TraceContext& trace,
                                    std::shared_ptr<DecodeHandler> handler) override;
  // Drops the channels of workers that are not in `view`, and dials those that are new.
  void Keep(const ClusterView& view) override;

 private:
  struct Peer {
    uint64_t incarnation;
    std::shared_ptr<grpc::Channel> channel;
  };
  std::shared_ptr<grpc::Channel> ChannelFor(const std::string& id, uint64_t incarnation,
                                            const std::string& address)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<const ClusterCredentials> credentials_;
  absl::Mutex mutex_;
  std::map<std::string, Peer> peers_ ABSL_GUARDED_BY(mutex_);  // by worker id
};

}  // namespace tandem::router
