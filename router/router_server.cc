#include "router/router_server.h"

#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "router/api/grpc_decode_client.h"

namespace tandem::router {
RouterServer::RouterServer(const RouterServerOptions& options, ServedModel model, Metrics* metrics,
                           Clock* clock)
    : core_(options.core, std::move(model), std::make_unique<GrpcDecodeClient>(), metrics, clock),
      cluster_service_(&core_),
      inference_service_(options.inference, &core_),
      admin_service_(&core_) {
  core_.SetListener([this] { OnClusterChanged(); });
  core_.Start();
}

absl::StatusOr<std::unique_ptr<RouterServer>> RouterServer::Start(
    const RouterServerOptions& options, ServedModel model, Metrics* metrics, Clock* clock) {
  std::unique_ptr<RouterServer> router(new RouterServer(options, std::move(model), metrics, clock));
  RpcServerOptions server;
  server.listen_address = options.listen_address;
  {
    // A worker may join before Start has stored the server.
    absl::MutexLock lock(&router->mutex_);
    TANDEM_ASSIGN_OR_RETURN(router->server_, RpcServer::Start(server, {&router->inference_service_,
                                                                       &router->admin_service_,
                                                                       &router->cluster_service_}));
    router->started_ = true;
  }
  router->OnClusterChanged();
  return router;
}

RouterServer::~RouterServer() {
  if (server_ != nullptr) Drain(absl::ZeroDuration());
}

void RouterServer::OnClusterChanged() {
  absl::MutexLock lock(&mutex_);
  // Read again under the lock: of two changes at once the later view must count.
  const bool serving = core_.view()->Serving() && !draining_;
  if (!started_ || serving == serving_) return;
  serving_ = serving;
  server_->SetServing(serving);
  spdlog::info("{}", serving ? "serving" : "not serving: no usable set of workers");
}

int RouterServer::Drain(absl::Duration timeout) {
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    if (serving_) server_->SetServing(false);
    serving_ = false;
  }
  core_.open_streams().StopAccepting();
  const bool idle = core_.open_streams().AwaitNone(timeout);
  const int cut = idle ? 0 : core_.open_streams().open();
  // Workers' Join streams never end by themselves: no grace for them.
  server_->Shutdown(absl::ZeroDuration());
  core_.open_streams().AwaitNone(absl::Seconds(5));
  return cut;
}

}  // namespace tandem::router
