// One router process: a RouterCore with gRPC around it. Two servers: clients, who are anyone, or
// have an API key, reach Inference; workers and operators, who prove the cluster secret, reach
// Cluster and Admin.
//
// Thread-safe after Start.
#pragma once

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "common/metrics/metrics.h"
#include "common/rpc/server.h"
#include "common/rpc/server_tls.h"
#include "router/api/admin_service.h"
#include "router/api/cluster_service.h"
#include "router/api/inference_service.h"
#include "router/core/router_core.h"
#include "router/keys/key_ring.h"

namespace tandem::router {

struct RouterServerOptions {
  std::string listen_address = "127.0.0.1:0";           // the public API
  std::string internal_listen_address = "127.0.0.1:0";  // workers and operators
  std::string health_listen_address;                    // probes, who are anyone; "": none
  std::string api_keys_file;                            // "": the public API needs no key
  TlsFiles tls;                                         // of the public API; empty: none
  // Shown to workers and operators, who need one too; null: the secret is enough.
  std::shared_ptr<CertificateFiles> certificate;
  bool insecure = false;  // other hosts may reach the public API though it has neither
  // Of the public server: RpcServerOptions.
  int max_streams_per_connection = 1024;
  int64_t rpc_memory_bytes = int64_t{1} << 30;
  RouterCoreOptions core;
  InferenceServiceOptions inference;
};

class RouterServer {
 public:
  // `metrics` and `clock` outlive the server. INVALID_ARGUMENT for an address beyond loopback
  // without what makes it safe.
  static absl::StatusOr<std::unique_ptr<RouterServer>> Start(const RouterServerOptions& options,
                                                             ServedModel model, Metrics* metrics,
                                                             Clock* clock);
  ~RouterServer();  // stops at once if Drain did not run

  const std::string& address() const { return public_->address(); }
  const std::string& internal_address() const { return internal_->address(); }
  std::string health_address() const { return health_ == nullptr ? "" : health_->address(); }
  const ServedModel& model() const { return core_.model(); }
  // Refuses new requests, lets running streams end up to `timeout`, stops the server. Returns how
  // many streams were cut off.
  int Drain(absl::Duration timeout);

 private:
  RouterServer(const RouterServerOptions& options, ServedModel model,
               std::shared_ptr<const ClusterCredentials> credentials, std::unique_ptr<KeyRing> keys,
               Metrics* metrics, Clock* clock);
  void OnClusterChanged();
  void SetServing(bool serving) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<const ClusterCredentials> credentials_;
  const std::unique_ptr<KeyRing> keys_;  // null: no key is needed
  RouterCore core_;
  ClusterService cluster_service_;
  InferenceService inference_service_;
  AdminService admin_service_;
  absl::Mutex mutex_;
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  // Constant after Start; last, so that they stop first.
  std::unique_ptr<RpcServer> internal_;
  std::unique_ptr<RpcServer> public_;
  std::unique_ptr<RpcServer> health_;  // null: none
};

}  // namespace tandem::router
