// What the router measures: every label child resolved once.
//
// Thread-safe.
#pragma once

#include <array>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"

#include "common/base/stage.h"
#include "common/metrics/metrics.h"

namespace tandem::router {

class RouterMetrics {
 public:
  enum class DecisionKind { kPrefill, kLocal };
  // Why a worker was chosen: its cache, its load, or because others had failed the request.
  enum class DecisionReason { kPrefix, kLoad, kRetry };
  enum class RetryReason { kWorkerLost, kWorkerFull };
  // By role ("prefill", "decode", "unified") and state ("ready", "stalled", "draining").
  using WorkerCounts = std::map<std::pair<std::string_view, std::string_view>, int>;

  // `metrics` outlives this.
  explicit RouterMetrics(Metrics* metrics);

  prometheus::Histogram& stage(Stage stage) { return *stages_[static_cast<size_t>(stage)]; }
  prometheus::Counter& decisions(DecisionKind kind, DecisionReason reason) {
    return *decisions_[static_cast<size_t>(kind)][static_cast<size_t>(reason)];
  }
  prometheus::Counter& retries(RetryReason reason) {
    return *retries_[static_cast<size_t>(reason)];
  }
  // By the status a request ended with.
  prometheus::Counter& requests(absl::StatusCode code);
  double AllRequests() const;
  // Of a request of whose `prompt_tokens` so many came from a cache: a hit if they are half of
  // them.
  TracedHistogram& ttft(size_t prompt_tokens, size_t cached_tokens);
  // Those of them that no worker was asked to serve.
  prometheus::Counter& rejected(absl::StatusCode code);
  // Who is in the cluster now; what `counts` lacks is 0.
  void SetWorkers(const WorkerCounts& counts);

  TracedHistogram& inter_token;               // tandem_inter_token_latency_seconds
  TracedHistogram& time_per_output_token;     // tandem_time_per_output_token_seconds
  TracedHistogram& duration;                  // tandem_request_duration_seconds
  prometheus::Gauge& running;                 // tandem_requests_running
  prometheus::Gauge& waiting;                 // tandem_requests_waiting
  prometheus::Counter& predicted_hit_tokens;  // tandem_router_predicted_hit_tokens_total
  prometheus::Counter& actual_hit_tokens;     // tandem_router_actual_hit_tokens_total
  prometheus::Counter& prompt_tokens;         // tandem_prompt_tokens_total
  prometheus::Counter& generation_tokens;     // tandem_generation_tokens_total
  prometheus::Counter& migrations;            // tandem_migrations_total
  prometheus::Counter& poison_refusals;       // tandem_poison_refusals_total

 private:
  std::array<prometheus::Histogram*, kStages.size()> stages_;
  std::array<std::array<prometheus::Counter*, 3>, 2> decisions_;
  std::array<prometheus::Counter*, 2> retries_;
  std::vector<prometheus::Counter*> requests_;  // by absl::StatusCode
  std::vector<prometheus::Counter*> rejected_;  // by absl::StatusCode
  TracedHistogram& ttft_hit_;                   // tandem_ttft_seconds{cache}
  TracedHistogram& ttft_miss_;
  std::map<WorkerCounts::key_type, prometheus::Gauge*> workers_;  // tandem_router_workers
};

}  // namespace tandem::router
