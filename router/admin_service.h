// tandem.v1.Admin: what an operator asks of the router.
//
// Thread-safe. Never blocks.
#pragma once

#include "grpcpp/grpcpp.h"

#include "common/base/clock.h"
#include "router/inference_service.h"
#include "router/registry/registry.h"
#include "router/stream/dispatcher.h"
#include "tandem/v1/admin.grpc.pb.h"

namespace tandem::router {

class AdminService : public v1::Admin::CallbackService {
 public:
  // All outlive this.
  AdminService(const ServedModel* model, Registry* registry, const Dispatcher* dispatcher,
               const InferenceService* inference, Clock* clock)
      : model_(model),
        registry_(registry),
        dispatcher_(dispatcher),
        inference_(inference),
        clock_(clock) {}

  grpc::ServerUnaryReactor* GetCluster(grpc::CallbackServerContext* context,
                                       const v1::GetClusterRequest* request,
                                       v1::GetClusterResponse* response) override;
  grpc::ServerUnaryReactor* DrainWorker(grpc::CallbackServerContext* context,
                                        const v1::DrainWorkerRequest* request,
                                        v1::DrainWorkerResponse* response) override;

 private:
  const ServedModel* const model_;
  Registry* const registry_;
  const Dispatcher* const dispatcher_;
  const InferenceService* const inference_;
  Clock* const clock_;
};

}  // namespace tandem::router
