#include "router/dispatch/routed_ledger.h"

namespace tandem::router {
namespace {

// An ended request that no report has confirmed by then never will be: the worker is gone.
constexpr absl::Duration kForget = absl::Seconds(10);

}  // namespace

void RoutedLedger::Count(const Entry& entry, int sign, Worker* worker) const {
  RoutedWork& sum = worker->sum;
  if (entry.ended != absl::InfiniteFuture()) {
    if (entry.began > worker->reported) return;
    sum.sequences -= sign * entry.work.sequences;
    sum.blocks -= sign * entry.work.blocks;
  } else if (entry.began >= worker->reported - slack_) {
    sum.sequences += sign * entry.work.sequences;
    sum.blocks += sign * entry.work.blocks;
    sum.prefill_tokens += sign * entry.work.prefill_tokens;
  }
}

void RoutedLedger::Recount(absl::Time ended_before, Worker* worker) const {
  absl::erase_if(worker->entries,
                 [&](const auto& entry) { return entry.second.ended < ended_before; });
  worker->sum = {};
  for (const auto& [request, entry] : worker->entries) Count(entry, +1, worker);
}

void RoutedLedger::Add(const std::string& worker, uint64_t request, absl::Time now,
                       const RoutedWork& work) {
  Worker& entry = workers_[worker];
  const Entry& added = entry.entries[request] = {now, absl::InfiniteFuture(), work};
  ++entry.total;
  Count(added, +1, &entry);
  places_[request].push_back(&entry);
}

void RoutedLedger::Remove(uint64_t request) {
  const auto place = places_.find(request);
  if (place == places_.end()) return;
  for (Worker* worker : place->second) {
    const auto it = worker->entries.find(request);
    Count(it->second, -1, worker);
    worker->entries.erase(it);
  }
  places_.erase(place);
}

void RoutedLedger::End(uint64_t request, absl::Time now) {
  const auto place = places_.find(request);
  if (place == places_.end()) return;
  for (Worker* worker : place->second) {
    Entry& entry = worker->entries.find(request)->second;
    Count(entry, -1, worker);
    entry.ended = now;
    Count(entry, +1, worker);
    if (now >= worker->forgot + kForget) {
      worker->forgot = now;
      Recount(now - kForget, worker);
    }
  }
  places_.erase(place);
}

RoutedWork RoutedLedger::Since(const std::string& worker, absl::Time reported) {
  const auto found = workers_.find(worker);
  if (found == workers_.end()) return {};
  Worker& entry = found->second;
  if (reported != entry.reported) {
    entry.reported = reported;
    // A worker lets go of a sequence before anyone hears of its end, so the report knows of it.
    Recount(reported, &entry);
  }
  RoutedWork sum = entry.sum;
  sum.total = entry.total;
  return sum;
}

}  // namespace tandem::router
