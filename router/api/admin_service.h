// tandem.v1.Admin: what an operator asks of the router.
//
// Thread-safe. Never blocks.
#pragma once

#include "grpcpp/grpcpp.h"

#include "router/core/router_core.h"
#include "tandem/v1/admin.grpc.pb.h"

namespace tandem::router {

class AdminService : public v1::Admin::CallbackService {
 public:
  // `core` outlives this.
  explicit AdminService(RouterCore* core) : core_(core) {}

  grpc::ServerUnaryReactor* GetCluster(grpc::CallbackServerContext* context,
                                       const v1::GetClusterRequest* request,
                                       v1::GetClusterResponse* response) override;
  grpc::ServerUnaryReactor* DrainWorker(grpc::CallbackServerContext* context,
                                        const v1::DrainWorkerRequest* request,
                                        v1::DrainWorkerResponse* response) override;

 private:
  RouterCore* const core_;
};

}  // namespace tandem::router
