// One router: its services, its membership and its dispatcher, put together.
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
#include "router/admin_service.h"
#include "router/inference_service.h"
#include "router/policy/cost_policy.h"
#include "router/prefix_index/prefix_index.h"
#include "router/registry/cluster_service.h"
#include "router/registry/registry.h"
#include "router/router_metrics.h"
#include "router/served_model.h"
#include "router/stream/decode_client.h"
#include "router/stream/dispatcher.h"

namespace tandem::router {

struct RouterOptions {
  std::string listen_address = "127.0.0.1:0";
  DispatcherOptions dispatcher;
  InferenceServiceOptions inference;
  CostPolicyOptions policy;
};

class Router {
 public:
  // `metrics` and `clock` outlive the router.
  static absl::StatusOr<std::unique_ptr<Router>> Start(const RouterOptions& options,
                                                       ServedModel model, Metrics* metrics,
                                                       Clock* clock);
  ~Router();  // stops at once if Drain did not run

  const std::string& address() const { return server_->address(); }
  const ServedModel& model() const { return model_; }
  // Refuses new requests, lets running streams end up to `timeout`, stops the server. Returns how
  // many streams were cut off.
  int Drain(absl::Duration timeout);

 private:
  Router(const RouterOptions& options, ServedModel model, Metrics* metrics, Clock* clock);
  void OnClusterChanged();

  const ServedModel model_;
  RouterMetrics metrics_;
  PrefixIndex index_;
  Registry registry_;
  const CostPolicy policy_;
  Dispatcher dispatcher_;
  DecodeClient decode_client_;
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
