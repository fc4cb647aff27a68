// One router process: a RouterCore with gRPC around it. Two servers: clients, who are anyone, reach
// Inference; workers and operators, who prove the cluster secret, reach Cluster and Admin.
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
#include "router/api/admin_service.h"
#include "router/api/cluster_service.h"
#include "router/api/inference_service.h"
#include "router/core/router_core.h"

namespace tandem::router {

struct RouterServerOptions {
  std::string listen_address = "127.0.0.1:0";           // the public API
  std::string internal_listen_address = "127.0.0.1:0";  // workers and operators
  // Of the public server: RpcServerOptions.
  int max_streams_per_connection = 1024;
  int64_t rpc_memory_bytes = int64_t{1} << 30;
  RouterCoreOptions core;
  InferenceServiceOptions inference;
};

class RouterServer {
 public:
  // `metrics` and `clock` outlive the server.
  static absl::StatusOr<std::unique_ptr<RouterServer>> Start(const RouterServerOptions& options,
                                                             ServedModel model, Metrics* metrics,
                                                             Clock* clock);
  ~RouterServer();  // stops at once if Drain did not run

  const std::string& address() const { return public_->address(); }
  const std::string& internal_address() const { return internal_->address(); }
  const ServedModel& model() const { return core_.model(); }
  // Refuses new requests, lets running streams end up to `timeout`, stops the server. Returns how
  // many streams were cut off.
  int Drain(absl::Duration timeout);

 private:
  RouterServer(const RouterServerOptions& options, ServedModel model,
               std::shared_ptr<const ClusterCredentials> credentials, Metrics* metrics,
               Clock* clock);
  void OnClusterChanged();
  void SetServing(bool serving) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::shared_ptr<const ClusterCredentials> credentials_;
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
};

}  // namespace tandem::router
