#include "common/trace/trace_metrics.h"

#include <string>

namespace tandem {
namespace {

prometheus::Counter& Dropped(Metrics* metrics, const std::string& reason) {
  return metrics->Counter("tandem_trace_spans_dropped_total",
                          "Spans lost: there was no room for them, or the collector did not take "
                          "them; with --otlp-endpoint only",
                          {{"reason", reason}});
}

}  // namespace

TraceMetrics::TraceMetrics(Metrics* metrics)
    : exported(metrics->Counter("tandem_trace_spans_exported_total",
                                "Spans that the collector has taken; with --otlp-endpoint only")),
      no_room(Dropped(metrics, "no_room")),
      not_taken(Dropped(metrics, "not_taken")) {}

}  // namespace tandem
