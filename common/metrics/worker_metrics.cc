#include "common/metrics/worker_metrics.h"

#include "absl/synchronization/mutex.h"

namespace tandem {
namespace {

constexpr size_t kMaxLinks = 1024;

prometheus::Gauge& BlockGauge(Metrics* metrics, const std::string& state) {
  return metrics->Gauge("tandem_kv_blocks", "Blocks of the KV pool by state", {{"state", state}});
}

}  // namespace

void KvBlockGauges::Set(int free_blocks, int cached_blocks, int used_blocks,
                        int quarantined_blocks) {
  free.Set(free_blocks);
  cached.Set(cached_blocks);
  used.Set(used_blocks);
  quarantined.Set(quarantined_blocks);
  const int taken = used_blocks + quarantined_blocks;
  const int total = free_blocks + cached_blocks + taken;
  usage.Set(total > 0 ? static_cast<double>(taken) / total : 0);
}

WorkerMetrics::WorkerMetrics(Metrics* metrics)
    : metrics_(metrics),
      requests_running(
          metrics->Gauge("tandem_worker_requests_running", "Requests that hold KV blocks here")),
      requests_waiting(
          metrics->Gauge("tandem_worker_requests_waiting", "Requests accepted and queued")),
      waiting_tokens(metrics->Gauge("tandem_worker_waiting_tokens",
                                    "Prompt tokens accepted here and not yet computed")),
      requests_finished(metrics->Counter("tandem_worker_requests_finished_total",
                                         "Requests ended as they should")),
      requests_failed(metrics->Counter("tandem_worker_requests_failed_total",
                                       "Requests ended by an error of this worker or a peer")),
      requests_cancelled(metrics->Counter("tandem_worker_requests_cancelled_total",
                                          "Requests given up by the caller or its deadline")),
      requests_rejected(metrics->Counter(
          "tandem_worker_requests_rejected_total",
          "Requests not taken for want of room or of prefill; they may be served elsewhere")),
      preemptions(metrics->Counter("tandem_preemptions_total",
                                   "Sequences that gave their blocks up to others, to be resumed")),
      prompt_tokens(
          metrics->Counter("tandem_worker_prompt_tokens_total", "Prompt tokens computed here")),
      generation_tokens(
          metrics->Counter("tandem_worker_generation_tokens_total", "Tokens sampled here")),
      prefix_query_tokens(metrics->Counter("tandem_prefix_cache_query_tokens_total",
                                           "Prompt tokens looked up in the prefix cache")),
      prefix_hit_tokens(metrics->Counter("tandem_prefix_cache_hit_tokens_total",
                                         "Prompt tokens found in the prefix cache")),
      damaged_blocks(metrics->Counter(
          "tandem_kv_damaged_blocks_total",
          "Cached KV blocks that no longer had the digest they were computed with")),
      step_seconds(metrics->Histogram("tandem_step_duration_seconds",
                                      "Duration of a forward pass over one batch",
                                      TokenGapBuckets())),
      batch_tokens(
          metrics->Histogram("tandem_batch_tokens", "Tokens per batch", BatchSizeBuckets())),
      batch_sequences(
          metrics->Histogram("tandem_batch_sequences", "Sequences per batch", BatchSizeBuckets())),
      inter_token_seconds(metrics->Histogram("tandem_worker_inter_token_latency_seconds",
                                             "Gap between consecutive tokens of a sequence",
                                             TokenGapBuckets())),
      kv_blocks{BlockGauge(metrics, "free"), BlockGauge(metrics, "cached"),
                BlockGauge(metrics, "used"), BlockGauge(metrics, "quarantined"),
                metrics->Gauge("tandem_kv_usage_ratio",
                               "Share of the KV pool that no request can have now, 0 to 1")} {
  for (const StageInfo& info : kStages) {
    stages_[static_cast<size_t>(info.stage)] =
        &metrics->Histogram("tandem_worker_request_stage_seconds",
                            "Where a request's time goes at this worker, by stage", StageBuckets(),
                            {{"stage", std::string(info.name)}});
  }
}

KvLinkMetrics& WorkerMetrics::KvLink(const std::string& src, const std::string& dst,
                                     const std::string& transport) {
  absl::MutexLock lock(&mutex_);
  std::array<std::string, 3> key = {src, dst, transport};
  // Names are drawn anew with each start of a worker: a bound keeps the time series few.
  if (links_.size() >= kMaxLinks && !links_.contains(key)) key = {"others", "others", "any"};
  std::unique_ptr<KvLinkMetrics>& link = links_[key];
  if (link == nullptr) {
    const MetricLabels labels = {{"src", key[0]}, {"dst", key[1]}, {"transport", key[2]}};
    link = std::make_unique<KvLinkMetrics>(KvLinkMetrics{
        metrics_->Histogram("tandem_kv_transfer_seconds",
                            "First byte to last byte of one request's KV blocks", StageBuckets(),
                            labels),
        metrics_->Counter("tandem_kv_transfer_bytes_total", "KV bytes shipped", labels),
        metrics_->Counter("tandem_kv_transfer_failures_total", "Shipments that did not complete",
                          labels)});
  }
  return *link;
}

void WorkerMetrics::ShowLinks(const std::string& src,
                              const std::map<std::string, tandem::KvLink>& links) {
  absl::MutexLock lock(&mutex_);
  for (const auto& [dst, link] : links) {
    const std::array<std::string, 3> key = {src, dst, link.transport};
    auto it = link_gauges_.find(key);
    if (it == link_gauges_.end()) {
      if (link_gauges_.size() >= kMaxLinks) continue;
      const MetricLabels labels = {{"src", src}, {"dst", dst}, {"transport", link.transport}};
      const KvLinkGauges gauges = {
          metrics_->Gauge("tandem_kv_link_bytes_per_second",
                          "Rate of KV blocks to a peer: of recent shipments, before any of the "
                          "self-test; 0: refused",
                          labels),
          metrics_->Gauge("tandem_kv_link_latency_seconds",
                          "The smallest message to a peer and back, by the self-test", labels)};
      it = link_gauges_.emplace(key, gauges).first;
    }
    it->second.bytes_per_second.Set(link.refused ? 0 : link.bytes_per_second);
    it->second.latency_seconds.Set(link.test.latency_seconds);
  }
}

}  // namespace tandem
