#include "router/router_server.h"

#include <algorithm>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/metrics/tls_metrics.h"
#include "common/rpc/public_server.h"
#include "router/api/grpc_decode_client.h"

namespace tandem::router {
namespace {

// Beyond any request that is not refused for its length: as text, with its escapes and its other
// fields, or as token ids.
int MaxRequestBytes(const InferenceServiceOptions& options, const ServedModel& model) {
  constexpr size_t kOtherBytes = 8 << 20;
  constexpr size_t kMaxIdBytes = 5;
  const size_t prompt = std::max(2 * options.max_prompt_bytes,
                                 kMaxIdBytes * static_cast<size_t>(model.config.MaxModelLen()));
  return static_cast<int>(std::min(prompt + kOtherBytes, size_t{1} << 30));
}

absl::Status RequireProtectionBeyondLoopback(const RouterServerOptions& options) {
  const bool is_protected = !options.api_keys_file.empty() || !options.tls.certificate.empty();
  TANDEM_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(options.listen_address));
  if (is_protected || options.insecure || IsLoopback(address.host)) return absl::OkStatus();
  return InvalidArgument(
      "--listen {} is reached from other hosts, by anybody: give --api-keys-file, or --tls-cert "
      "and --tls-key, or --insecure if that is what you want",
      options.listen_address);
}

}  // namespace

RouterServer::RouterServer(const RouterServerOptions& options, ServedModel model,
                           std::shared_ptr<const ClusterCredentials> credentials,
                           std::unique_ptr<KeyRing> keys, Metrics* metrics, Clock* clock)
    : credentials_(std::move(credentials)),
      keys_(std::move(keys)),
      core_(options.core, std::move(model), std::make_unique<GrpcDecodeClient>(credentials_),
            metrics, clock),
      cluster_service_(&core_),
      inference_service_(options.inference, &core_, keys_.get()),
      admin_service_(&core_) {
  core_.SetListener([this] { OnClusterChanged(); });
  core_.Start();
}

absl::StatusOr<std::unique_ptr<RouterServer>> RouterServer::Start(
    const RouterServerOptions& options, ServedModel model, Metrics* metrics, Clock* clock) {
  const std::string& secret = options.core.dispatcher.cluster_secret;
  TANDEM_RETURN_IF_ERROR(
      RequireSecretBeyondLoopback(secret, "--internal-listen", options.internal_listen_address));
  TANDEM_RETURN_IF_ERROR(RequireProtectionBeyondLoopback(options));
  TANDEM_ASSIGN_OR_RETURN(
      auto credentials,
      ClusterCredentials::Make(secret, {kRouterRole, "router"}, options.certificate));
  std::unique_ptr<KeyRing> keys;
  if (!options.api_keys_file.empty()) {
    TANDEM_ASSIGN_OR_RETURN(keys, KeyRing::Open(options.api_keys_file, metrics, clock));
  }
  std::unique_ptr<RouterServer> router(
      new RouterServer(options, std::move(model), credentials, std::move(keys), metrics, clock));
  RpcServerOptions open;
  open.listen_address = options.listen_address;
  open.max_streams_per_connection = options.max_streams_per_connection;
  open.memory_bytes = options.rpc_memory_bytes;
  open.max_receive_bytes = MaxRequestBytes(options.inference, router->model());
  std::shared_ptr<ServerTls> tls;
  if (!options.tls.certificate.empty()) {
    TANDEM_ASSIGN_OR_RETURN(
        tls, ServerTls::Open(options.tls, ShowExpiry(metrics, TlsCertificate::kPublic)));
  }
  RpcServerOptions internal;
  internal.listen_address = options.internal_listen_address;
  internal.credentials = credentials;
  internal.callers = {kPrefillRole, kDecodeRole, kOperatorRole};
  {
    // A worker may join before Start has stored the servers.
    absl::MutexLock lock(&router->mutex_);
    TANDEM_ASSIGN_OR_RETURN(router->public_,
                            StartPublicServer(open, tls, {&router->inference_service_}));
    TANDEM_ASSIGN_OR_RETURN(
        router->internal_,
        RpcServer::Start(internal, {&router->admin_service_, &router->cluster_service_}));
    if (!options.health_listen_address.empty()) {
      TANDEM_ASSIGN_OR_RETURN(
          router->health_, RpcServer::Start({.listen_address = options.health_listen_address}, {}));
    }
    router->started_ = true;
  }
  router->OnClusterChanged();
  return router;
}

RouterServer::~RouterServer() {
  if (public_ != nullptr && internal_ != nullptr) Drain(absl::ZeroDuration());
}

void RouterServer::OnClusterChanged() {
  absl::MutexLock lock(&mutex_);
  // Read again under the lock: of two changes at once the later view must count.
  const bool serving = core_.view()->Serving() && !draining_;
  if (!started_ || serving == serving_) return;
  SetServing(serving);
  spdlog::info("{}", serving ? "serving" : "not serving: no usable set of workers");
}

void RouterServer::SetServing(bool serving) {
  serving_ = serving;
  public_->SetServing(serving);
  internal_->SetServing(serving);
  if (health_ != nullptr) health_->SetServing(serving);
}

int RouterServer::Drain(absl::Duration timeout) {
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    if (serving_) SetServing(false);
  }
  core_.open_streams().StopAccepting();
  const bool idle = core_.open_streams().AwaitNone(timeout);
  const int cut = idle ? 0 : core_.open_streams().open();
  public_->Shutdown(absl::ZeroDuration());
  // Workers' Join streams never end by themselves; the grace is for their last word to be sent.
  cluster_service_.EndAll();
  internal_->Shutdown(absl::Seconds(1));
  core_.open_streams().AwaitNone(absl::Seconds(5));
  return cut;
}

}  // namespace tandem::router
