// Whether a worker's routers have it, as metrics.
#pragma once

#include <cstddef>

#include "common/metrics/metrics.h"

namespace tandem::worker {

// tandem_worker_routers{state}. Thread-safe.
class ClusterMetrics {
 public:
  // `metrics` outlives this.
  explicit ClusterMetrics(Metrics* metrics);

  void SetRouters(size_t routers, size_t joined);

 private:
  prometheus::Gauge& joined_;
  prometheus::Gauge& missing_;
};

}  // namespace tandem::worker
