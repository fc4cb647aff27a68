// tandem.internal.v1.Cluster: one Join stream per worker feeds the registry and the prefix index.
//
// Thread-safe. Never blocks.
#pragma once

#include "grpcpp/grpcpp.h"

#include "router/prefix_index/prefix_index.h"
#include "router/registry/registry.h"
#include "tandem/internal/v1/cluster.grpc.pb.h"

namespace tandem::router {

class ClusterService : public internal::v1::Cluster::CallbackService {
 public:
  // All outlive this, and this outlives its server.
  ClusterService(std::string router_id, Registry* registry, PrefixIndex* index)
      : router_id_(std::move(router_id)), registry_(registry), index_(index) {}

  grpc::ServerBidiReactor<internal::v1::WorkerMessage, internal::v1::RouterMessage>* Join(
      grpc::CallbackServerContext* context) override;

 private:
  class Stream;

  const std::string router_id_;
  Registry* const registry_;
  PrefixIndex* const index_;
};

}  // namespace tandem::router
