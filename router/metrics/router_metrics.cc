#include "router/metrics/router_metrics.h"

#include <string>

namespace tandem::router {
namespace {

constexpr size_t kNumCodes = static_cast<size_t>(absl::StatusCode::kUnauthenticated) + 1;

size_t IndexOf(absl::StatusCode code) {
  const size_t index = static_cast<size_t>(code);
  return index < kNumCodes ? index : static_cast<size_t>(absl::StatusCode::kUnknown);
}

TracedHistogram& Ttft(Metrics* metrics, const char* cache) {
  return metrics->TracedHistogram("tandem_ttft_seconds",
                                  "Request received to first message written; a hit had half of "
                                  "its prompt or more in a cache.",
                                  RequestBuckets(), {{"cache", cache}});
}

}  // namespace

RouterMetrics::RouterMetrics(Metrics* metrics)
    : inter_token(metrics->TracedHistogram(
          "tandem_inter_token_latency_seconds",
          "Gap between consecutive tokens as the router gets them.", TokenGapBuckets())),
      time_per_output_token(metrics->TracedHistogram(
          "tandem_time_per_output_token_seconds",
          "Mean gap between the tokens of one request, the first aside.", TokenGapBuckets())),
      duration(metrics->TracedHistogram("tandem_request_duration_seconds",
                                        "Request received to last message written.",
                                        RequestBuckets())),
      running(metrics->Gauge("tandem_requests_running", "Requests at a decode worker.")),
      waiting(metrics->Gauge("tandem_requests_waiting", "Requests in the router's queue.")),
      predicted_hit_tokens(
          metrics->Counter("tandem_router_predicted_hit_tokens_total",
                           "Prompt tokens that routing expected in the chosen prefix cache.")),
      actual_hit_tokens(metrics->Counter("tandem_router_actual_hit_tokens_total",
                                         "Prompt tokens that workers served from a cache.")),
      prompt_tokens(metrics->Counter("tandem_prompt_tokens_total",
                                     "Prompt tokens of requests that produced a token.")),
      generation_tokens(
          metrics->Counter("tandem_generation_tokens_total", "Tokens received from workers.")),
      migrations(metrics->Counter(
          "tandem_migrations_total",
          "Streams that lost their decode worker after the first token and went on elsewhere.")),
      poison_refusals(
          metrics->Counter("tandem_poison_refusals_total",
                           "Requests refused because workers died with the same prompt.")),
      ttft_hit_(Ttft(metrics, "hit")),
      ttft_miss_(Ttft(metrics, "miss")) {
  for (const StageInfo& info : kStages) {
    stages_[static_cast<size_t>(info.stage)] =
        &metrics->Histogram("tandem_request_stage_seconds", "Time that requests spent, by stage.",
                            StageBuckets(), {{"stage", std::string(info.name)}});
  }
  constexpr std::array<const char*, 2> kKinds = {"prefill", "local"};
  constexpr std::array<const char*, 3> kReasons = {"prefix", "load", "retry"};
  for (size_t kind = 0; kind < kKinds.size(); ++kind) {
    for (size_t reason = 0; reason < kReasons.size(); ++reason) {
      decisions_[kind][reason] = &metrics->Counter(
          "tandem_router_decisions_total", "Routing decisions, by where prefill runs and why.",
          {{"kind", kKinds[kind]}, {"reason", kReasons[reason]}});
    }
  }
  constexpr std::array<const char*, 2> kRetries = {"worker_lost", "worker_full"};
  for (size_t i = 0; i < kRetries.size(); ++i) {
    retries_[i] =
        &metrics->Counter("tandem_retries_total", "Requests sent to another worker, by why.",
                          {{"reason", kRetries[i]}});
  }
  for (const char* role : {"prefill", "decode", "unified"}) {
    for (const char* state : {"ready", "stalled", "draining"}) {
      workers_[{role, state}] =
          &metrics->Gauge("tandem_router_workers", "Workers that have joined, by role and state.",
                          {{"worker_role", role}, {"state", state}});
    }
  }
  for (size_t code = 0; code < kNumCodes; ++code) {
    const MetricLabels label = {
        {"code", std::string(absl::StatusCodeToString(static_cast<absl::StatusCode>(code)))}};
    requests_.push_back(
        &metrics->Counter("tandem_requests_total", "Requests ended, by status code.", label));
    rejected_.push_back(&metrics->Counter(
        "tandem_requests_rejected_total",
        "Requests that ended before any worker was asked: not valid, no room, given up.", label));
  }
}

prometheus::Counter& RouterMetrics::requests(absl::StatusCode code) {
  return *requests_[IndexOf(code)];
}

double RouterMetrics::AllRequests() const {
  double sum = 0;
  for (const prometheus::Counter* by_code : requests_) sum += by_code->Value();
  return sum;
}

prometheus::Counter& RouterMetrics::rejected(absl::StatusCode code) {
  return *rejected_[IndexOf(code)];
}

TracedHistogram& RouterMetrics::ttft(size_t prompt_tokens, size_t cached_tokens) {
  return cached_tokens > 0 && 2 * cached_tokens >= prompt_tokens ? ttft_hit_ : ttft_miss_;
}

void RouterMetrics::SetWorkers(const WorkerCounts& counts) {
  for (const auto& [role_and_state, gauge] : workers_) {
    const auto count = counts.find(role_and_state);
    gauge->Set(count == counts.end() ? 0 : count->second);
  }
}

}  // namespace tandem::router
