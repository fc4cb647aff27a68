// One router process: a RouterCore with gRPC around it.
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
  std::string listen_address = "127.0.0.1:0";
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

  const std::string& address() const { return server_->address(); }
  const ServedModel& model() const { return core_.model(); }
  // Refuses new requests, lets running streams end up to `timeout`, stops the server. Returns how
  // many streams were cut off.
  int Drain(absl::Duration timeout);

 private:
  RouterServer(const RouterServerOptions& options, ServedModel model, Metrics* metrics,
               Clock* clock);
  void OnClusterChanged();

  RouterCore core_;
  ClusterService cluster_service_;
  InferenceService inference_service_;
  AdminService admin_service_;
  absl::Mutex mutex_;
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  std::unique_ptr<RpcServer> server_;  // constant after Start; last, so that it stops first
};

}  // namespace tandem::router
