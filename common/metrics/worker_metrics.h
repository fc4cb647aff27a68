// What both kinds of worker measure: one table of names, so that dashboards and alerts need not
// know which kind they look at. What the router counts too, as clients see it, begins with
// tandem_worker_ here: a request passes through several workers, and a sum over all processes must
// not count it more than once.
//
// Thread-safe. Every label child is resolved here, once; owners keep the references. Only KV links
// to peers appear while running (KvLink()), one child per peer.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/base/kv_link.h"
#include "common/base/stage.h"
#include "common/metrics/metrics.h"

namespace tandem {

// Blocks of the KV pool by what holds them; labels of tandem_kv_blocks{state}.
struct KvBlockGauges {
  prometheus::Gauge& free;
  prometheus::Gauge& cached;
  prometheus::Gauge& used;
  prometheus::Gauge& quarantined;
  prometheus::Gauge& usage;  // tandem_kv_usage_ratio

  void Set(int free_blocks, int cached_blocks, int used_blocks, int quarantined_blocks);
};

// KV shipments over one (src, dst, transport).
struct KvLinkMetrics {
  prometheus::Histogram& seconds;  // tandem_kv_transfer_seconds: first byte to last byte
  prometheus::Counter& bytes;      // tandem_kv_transfer_bytes_total
  prometheus::Counter& failures;   // tandem_kv_transfer_failures_total
};

// What is known of one (src, dst, transport), at its sender.
struct KvLinkGauges {
  prometheus::Gauge& bytes_per_second;  // tandem_kv_link_bytes_per_second
  prometheus::Gauge& latency_seconds;   // tandem_kv_link_latency_seconds
};

class WorkerMetrics {
 public:
  // `metrics` outlives this.
  explicit WorkerMetrics(Metrics* metrics);

  // Seconds that a request spent in `stage`: tandem_worker_request_stage_seconds{stage}.
  prometheus::Histogram& stage(Stage stage) { return *stages_[static_cast<size_t>(stage)]; }
  // The children of one link; `src` and `dst` are worker ids.
  KvLinkMetrics& KvLink(const std::string& src, const std::string& dst,
                        const std::string& transport);
  // Shows what the sender `src` knows of its ways to peers, by worker id; 0 where a link is
  // refused.
  void ShowLinks(const std::string& src, const std::map<std::string, tandem::KvLink>& links);

 private:
  Metrics* const metrics_;

 public:
  prometheus::Gauge& requests_running;      // tandem_worker_requests_running
  prometheus::Gauge& requests_waiting;      // tandem_worker_requests_waiting
  prometheus::Gauge& waiting_tokens;        // tandem_worker_waiting_tokens
  prometheus::Counter& requests_finished;   // tandem_worker_requests_finished_total
  prometheus::Counter& requests_failed;     // tandem_worker_requests_failed_total
  prometheus::Counter& requests_cancelled;  // tandem_worker_requests_cancelled_total
  prometheus::Counter& requests_rejected;   // tandem_worker_requests_rejected_total
  prometheus::Counter& preemptions;         // tandem_preemptions_total
  prometheus::Counter& prompt_tokens;  // tandem_worker_prompt_tokens_total: computed, not cached
  prometheus::Counter& generation_tokens;      // tandem_worker_generation_tokens_total
  prometheus::Counter& prefix_query_tokens;    // tandem_prefix_cache_query_tokens_total
  prometheus::Counter& prefix_hit_tokens;      // tandem_prefix_cache_hit_tokens_total
  prometheus::Counter& damaged_blocks;         // tandem_kv_damaged_blocks_total
  prometheus::Histogram& step_seconds;         // tandem_step_duration_seconds
  prometheus::Histogram& batch_tokens;         // tandem_batch_tokens
  prometheus::Histogram& batch_sequences;      // tandem_batch_sequences
  prometheus::Histogram& inter_token_seconds;  // tandem_worker_inter_token_latency_seconds
  KvBlockGauges kv_blocks;                     // tandem_kv_blocks{state}

 private:
  std::array<prometheus::Histogram*, kStages.size()> stages_;
  absl::Mutex mutex_;
  std::map<std::array<std::string, 3>, std::unique_ptr<KvLinkMetrics>> links_
      ABSL_GUARDED_BY(mutex_);
  std::map<std::array<std::string, 3>, KvLinkGauges> link_gauges_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem
