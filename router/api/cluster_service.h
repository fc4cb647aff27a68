// tandem.internal.v1.Cluster: one Join stream per worker, each a Membership with gRPC around it.
//
// Thread-safe. Never blocks.
#pragma once

#include "grpcpp/grpcpp.h"

#include "router/core/router_core.h"
#include "tandem/internal/v1/cluster.grpc.pb.h"

namespace tandem::router {

class ClusterService : public internal::v1::Cluster::CallbackService {
 public:
  // `core` outlives this, and this outlives its server.
  explicit ClusterService(RouterCore* core) : core_(core) {}

  grpc::ServerBidiReactor<internal::v1::WorkerMessage, internal::v1::RouterMessage>* Join(
      grpc::CallbackServerContext* context) override;

 private:
  RouterCore* const core_;
};

}  // namespace tandem::router
