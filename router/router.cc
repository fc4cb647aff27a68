#include "router/router.h"

#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/rpc/cluster_client.h"

namespace tandem::router {
namespace {

RegistryOptions MakeRegistryOptions(const ServedModel& model, const std::string& cluster_secret) {
  RegistryOptions options;
  options.model = model.name;
  options.tokenizer_digest = model.tokenizer_digest;
  options.vocab_size = static_cast<uint32_t>(model.config.vocab_size);
  options.cluster_secret_digest = ClusterSecretDigest(cluster_secret);
  return options;
}

}  // namespace

Router::Router(const RouterOptions& options, ServedModel model, Metrics* metrics, Clock* clock)
    : model_(std::move(model)),
      metrics_(metrics),
      registry_(MakeRegistryOptions(model_, options.dispatcher.cluster_secret), &index_, clock),
      policy_(options.policy),
      dispatcher_(options.dispatcher, &registry_, &index_, &policy_, &metrics_, clock),
      cluster_service_(fmt::format("router-{:016x}", RandomUint64()), &registry_, &index_),
      inference_service_(options.inference, &model_, &registry_,
                         StreamContext{&dispatcher_, &decode_client_, &metrics_, clock}),
      admin_service_(&model_, &registry_, &dispatcher_, &inference_service_, clock) {
  registry_.SetListener([this] { OnClusterChanged(); });
}

absl::StatusOr<std::unique_ptr<Router>> Router::Start(const RouterOptions& options,
                                                      ServedModel model, Metrics* metrics,
                                                      Clock* clock) {
  std::unique_ptr<Router> router(new Router(options, std::move(model), metrics, clock));
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

Router::~Router() {
  if (server_ != nullptr) Drain(absl::ZeroDuration());
}

void Router::OnClusterChanged() {
  dispatcher_.Kick();
  const std::shared_ptr<const ClusterView> view = registry_.view();
  decode_client_.Keep(*view);
  absl::MutexLock lock(&mutex_);
  // Read again under the lock: of two changes at once the later view must count.
  const bool serving = registry_.view()->Serving() && !draining_;
  if (!started_ || serving == serving_) return;
  serving_ = serving;
  server_->SetServing(serving);
  spdlog::info("{}", serving ? "serving" : "not serving: no usable set of workers");
}

int Router::Drain(absl::Duration timeout) {
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    if (serving_) server_->SetServing(false);
    serving_ = false;
  }
  inference_service_.StopAccepting();
  const bool idle = inference_service_.AwaitIdle(timeout);
  const int cut = idle ? 0 : inference_service_.running();
  // Workers' Join streams never end by themselves: no grace for them.
  server_->Shutdown(absl::ZeroDuration());
  inference_service_.AwaitIdle(absl::Seconds(5));
  return cut;
}

}  // namespace tandem::router
