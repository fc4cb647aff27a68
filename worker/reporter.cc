#include "worker/reporter.h"

#include <utility>

namespace tandem::worker {

Reporter::Reporter(ReporterOptions options, Reports reports, const engine::BlockPool* pool,
                   engine::PrefixCache* cache, WorkerMetrics* metrics, Clock* clock)
    : options_(options),
      reports_(std::move(reports)),
      pool_(pool),
      cache_(cache),
      metrics_(metrics),
      clock_(clock) {}

void Reporter::Report(const std::function<LoadReport()>& load) {
  if (reports_.turn) reports_.turn();
  const engine::BlockEvents events = cache_->TakeEvents();
  if (reports_.blocks && !(events.stored.empty() && events.removed.empty())) {
    reports_.blocks(events, /*cleared=*/false);
  }
  const absl::Time now = clock_->Now();
  if (now - last_report_ < IdleWait()) return;
  last_report_ = now;
  changed_ = false;
  LoadReport current = load();
  const engine::BlockPoolCounts blocks = pool_->counts();
  current.blocks_free = blocks.free;
  current.blocks_cached = blocks.cached;
  current.blocks_used = blocks.used;
  current.blocks_quarantined = blocks.quarantined;
  SetMetrics(current);
  if (reports_.load) reports_.load(current);
}

void Reporter::ReportSnapshot() {
  if (!reports_.blocks) return;
  reports_.blocks(engine::BlockEvents{.stored = cache_->Snapshot()}, /*cleared=*/true);
}

void Reporter::SetMetrics(const LoadReport& load) {
  metrics_->requests_running.Set(load.running);
  metrics_->requests_waiting.Set(load.waiting);
  metrics_->waiting_tokens.Set(static_cast<double>(load.waiting_tokens));
  metrics_->kv_blocks.Set(load.blocks_free, load.blocks_cached, load.blocks_used,
                          load.blocks_quarantined);
  const uint64_t query = cache_->query_tokens();
  const uint64_t hit = cache_->hit_tokens();
  metrics_->prefix_query_tokens.Increment(
      static_cast<double>(query - std::exchange(query_tokens_seen_, query)));
  metrics_->prefix_hit_tokens.Increment(
      static_cast<double>(hit - std::exchange(hit_tokens_seen_, hit)));
}

}  // namespace tandem::worker
