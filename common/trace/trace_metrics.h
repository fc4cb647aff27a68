// What a process that traces measures of it.
#pragma once

#include "common/metrics/metrics.h"

namespace tandem {

struct TraceMetrics {
  // `metrics` outlives this.
  explicit TraceMetrics(Metrics* metrics);

  prometheus::Counter& exported;   // tandem_trace_spans_exported_total
  prometheus::Counter& no_room;    // tandem_trace_spans_dropped_total{reason="no_room"}
  prometheus::Counter& not_taken;  // tandem_trace_spans_dropped_total{reason="not_taken"}
};

}  // namespace tandem
