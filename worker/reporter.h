// When a loop tells the cluster and the metrics about its load and its prefix cache.
//
// Not thread-safe: part of a worker's loop.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/metrics/worker_metrics.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "worker/reports.h"

namespace tandem::worker {

struct ReporterOptions {
  absl::Duration interval = absl::Milliseconds(200);
  absl::Duration min_interval = absl::Milliseconds(20);  // where something changed
};

class Reporter {
 public:
  // All outlive this.
  Reporter(ReporterOptions options, Reports reports, const engine::BlockPool* pool,
           engine::PrefixCache* cache, WorkerMetrics* metrics, Clock* clock);

  // The load is not what it was: the next report is due after `min_interval`.
  void NoteChange() { changed_ = true; }
  // How long an idle loop may sleep without being late for the next report.
  absl::Duration IdleWait() const { return changed_ ? options_.min_interval : options_.interval; }

  // Once per turn of the loop. Reports if it is time to; asks `load` only then, for all but the
  // blocks. Changes of the prefix cache go out with every call, because a router that does not know
  // a block sends its prompt elsewhere.
  void Report(const std::function<LoadReport()>& load);
  // Answers SnapshotWanted.
  void ReportSnapshot();

 private:
  void SetMetrics(const LoadReport& load);

  const ReporterOptions options_;
  const Reports reports_;
  const engine::BlockPool* const pool_;
  engine::PrefixCache* const cache_;
  WorkerMetrics* const metrics_;
  Clock* const clock_;
  uint64_t query_tokens_seen_ = 0;  // of the cache's counters, already in the metrics
  uint64_t hit_tokens_seen_ = 0;
  absl::Time last_report_ = absl::InfinitePast();
  bool changed_ = true;  // since the last report
};

}  // namespace tandem::worker
