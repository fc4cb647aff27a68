#include "router/dispatch/routed_ledger.h"

namespace tandem::router {
namespace {

// An ended request that no report has confirmed by then never will be: the worker is gone.
constexpr absl::Duration kForget = absl::Seconds(10);

}  // namespace

void RoutedLedger::Add(const std::string& worker, uint64_t request, absl::Time now,
                       const RoutedWork& work) {
  Worker& entry = workers_[worker];
  entry.entries[request] = {now, absl::InfiniteFuture(), work};
  ++entry.total;
}

void RoutedLedger::Remove(uint64_t request) {
  for (auto& [id, worker] : workers_) worker.entries.erase(request);
}

void RoutedLedger::End(uint64_t request, absl::Time now) {
  for (auto& [id, worker] : workers_) {
    const auto it = worker.entries.find(request);
    if (it == worker.entries.end()) continue;
    it->second.ended = now;
    absl::erase_if(worker.entries,
                   [&](const auto& entry) { return entry.second.ended < now - kForget; });
  }
}

RoutedWork RoutedLedger::Since(const std::string& worker, absl::Time reported) {
  RoutedWork sum;
  const auto found = workers_.find(worker);
  if (found == workers_.end()) return sum;
  const absl::Time known = reported - slack_;
  absl::erase_if(found->second.entries,
                 [&](const auto& entry) { return entry.second.ended < known; });
  for (const auto& [request, entry] : found->second.entries) {
    const bool in_report = entry.began < known;
    const bool ended = entry.ended != absl::InfiniteFuture();
    if (in_report && ended) {
      sum.sequences -= entry.work.sequences;
      sum.blocks -= entry.work.blocks;
    } else if (!in_report && !ended) {
      sum.sequences += entry.work.sequences;
      sum.blocks += entry.work.blocks;
      sum.prefill_tokens += entry.work.prefill_tokens;
    }
  }
  sum.total = found->second.total;
  return sum;
}

}  // namespace tandem::router
