// tandem.internal.v1.Cluster: one Join stream per worker, each a Membership with gRPC around it.
//
// Thread-safe. Never blocks.
#pragma once

#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/grpcpp.h"

#include "router/core/router_core.h"
#include "tandem/internal/v1/cluster.grpc.pb.h"

namespace tandem::router {

class JoinReactor;

class ClusterService : public internal::v1::Cluster::CallbackService {
 public:
  // `core` outlives this, and this outlives its server.
  explicit ClusterService(RouterCore* core) : core_(core) {}

  grpc::ServerBidiReactor<internal::v1::WorkerMessage, internal::v1::RouterMessage>* Join(
      grpc::CallbackServerContext* context) override;
  // The router stops: ends every stay with OK, by which a worker knows that nothing has failed.
  // Nobody joins any more.
  void EndAll();

 private:
  RouterCore* const core_;
  absl::Mutex mutex_;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::weak_ptr<JoinReactor>> reactors_ ABSL_GUARDED_BY(mutex_);  // some may be gone
};

}  // namespace tandem::router
