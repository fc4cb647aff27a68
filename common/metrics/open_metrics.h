// The page of a process as OpenMetrics 1.0 (https://prometheus.io/docs/specs/om/open_metrics_spec),
// which has room for exemplars; the older text format, which everybody reads, has none.
//
// Pure functions.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "prometheus/metric_family.h"

#include "common/metrics/traced_histogram.h"

namespace tandem {

inline constexpr char kOpenMetricsType[] =
    "application/openmetrics-text; version=1.0.0; charset=utf-8";

// Whether who sends this Accept header would rather have OpenMetrics 1.0 than the older text.
bool WantsOpenMetrics(const std::string& accept);

// The exemplars of one histogram's buckets, in their order; empty: it has none.
using ExemplarsOf = std::function<std::vector<std::optional<Exemplar>>(
    const std::string& family, const prometheus::ClientMetric& metric)>;

// Counters, gauges and histograms; names of counters end with _total, and a name stands in
// `families` once.
std::string OpenMetricsText(const std::vector<prometheus::MetricFamily>& families,
                            const ExemplarsOf& exemplars_of);

}  // namespace tandem
