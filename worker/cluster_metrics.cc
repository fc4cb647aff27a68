#include "worker/cluster_metrics.h"

namespace tandem::worker {
namespace {

prometheus::Gauge& Routers(Metrics* metrics, const char* state) {
  return metrics->Gauge("tandem_worker_routers",
                        "Routers that --router names, by whether this worker is a member there: "
                        "joined, missing",
                        {{"state", state}});
}

}  // namespace

ClusterMetrics::ClusterMetrics(Metrics* metrics)
    : joined_(Routers(metrics, "joined")), missing_(Routers(metrics, "missing")) {}

void ClusterMetrics::SetRouters(size_t routers, size_t joined) {
  joined_.Set(static_cast<double>(joined));
  missing_.Set(static_cast<double>(routers - joined));
}

}  // namespace tandem::worker
