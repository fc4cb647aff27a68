// What every process says of itself: the usual process_* metrics, and what it was built from.
#pragma once

#include "common/metrics/metrics.h"

namespace tandem {

// process_cpu_seconds_total, process_resident_memory_bytes and others, read from /proc whenever the
// page is. `labels` as in Metrics::SetLabels.
void AddProcessMetrics(Metrics* metrics, const MetricLabels& labels);
// tandem_build_info, always 1.
void AddBuildInfo(Metrics* metrics);

}  // namespace tandem
