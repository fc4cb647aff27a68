// What the decode worker measures beyond what both kinds of worker do.
#pragma once

#include "common/metrics/metrics.h"
#include "common/metrics/worker_metrics.h"

namespace tandem::decode {

// Thread-safe; children are resolved once, here.
struct DecodeMetrics {
  // `metrics` outlives this.
  explicit DecodeMetrics(Metrics* metrics);

  WorkerMetrics worker;
  prometheus::Histogram& time_per_output_token;  // tandem_worker_time_per_output_token_seconds
  prometheus::Counter& prefill_retries;          // tandem_prefill_retries_total
  prometheus::Counter& kv_recomputes;            // tandem_kv_recomputes_total
  prometheus::Counter& slow_readers;             // tandem_slow_reader_pauses_total
  prometheus::Counter& drafted_tokens;           // tandem_drafted_tokens_total
  prometheus::Counter& accepted_tokens;          // tandem_accepted_tokens_total
};

}  // namespace tandem::decode
