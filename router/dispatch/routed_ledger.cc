#include "router/dispatch/routed_ledger.h"

namespace tandem::router {
namespace {

// An ended request that no report has confirmed by then never will be: the worker is gone.
constexpr absl::Duration kForget = absl::Seconds(10);

// What an entry adds to the sum, with `sign` +1, or takes from it, with -1.
void Count(absl::Time began, absl::Time ended, const RoutedWork& work, absl::Time known, int sign,
           RoutedWork* sum) {
  const bool in_report = began < known;
  const bool has_ended = ended != absl::InfiniteFuture();
  if (in_report && has_ended) {
    sum->sequences -= sign * work.sequences;
    sum->blocks -= sign * work.blocks;
  } else if (!in_report && !has_ended) {
    sum->sequences += sign * work.sequences;
    sum->blocks += sign * work.blocks;
    sum->prefill_tokens += sign * work.prefill_tokens;
  }
}

}  // namespace

void RoutedLedger::Worker::Recount(absl::Time ended_before) {
  absl::erase_if(entries, [&](const auto& entry) { return entry.second.ended < ended_before; });
  sum = {};
  for (const auto& [request, entry] : entries) {
    Count(entry.began, entry.ended, entry.work, known, +1, &sum);
  }
}

void RoutedLedger::Add(const std::string& worker, uint64_t request, absl::Time now,
                       const RoutedWork& work) {
  Worker& entry = workers_[worker];
  entry.entries[request] = {now, absl::InfiniteFuture(), work};
  ++entry.total;
  Count(now, absl::InfiniteFuture(), work, entry.known, +1, &entry.sum);
  places_[request].push_back(&entry);
}

void RoutedLedger::Remove(uint64_t request) {
  const auto place = places_.find(request);
  if (place == places_.end()) return;
  for (Worker* worker : place->second) {
    const auto it = worker->entries.find(request);
    Count(it->second.began, it->second.ended, it->second.work, worker->known, -1, &worker->sum);
    worker->entries.erase(it);
  }
  places_.erase(place);
}

void RoutedLedger::End(uint64_t request, absl::Time now) {
  const auto place = places_.find(request);
  if (place == places_.end()) return;
  for (Worker* worker : place->second) {
    Entry& entry = worker->entries.find(request)->second;
    Count(entry.began, entry.ended, entry.work, worker->known, -1, &worker->sum);
    entry.ended = now;
    Count(entry.began, entry.ended, entry.work, worker->known, +1, &worker->sum);
    if (now >= worker->forgot + kForget) {
      worker->forgot = now;
      worker->Recount(now - kForget);
    }
  }
  places_.erase(place);
}

RoutedWork RoutedLedger::Since(const std::string& worker, absl::Time reported) {
  const auto found = workers_.find(worker);
  if (found == workers_.end()) return {};
  Worker& entry = found->second;
  if (const absl::Time known = reported - slack_; known != entry.known) {
    entry.known = known;
    // A worker lets go of a sequence before anyone hears of its end, so the report knows of it.
    entry.Recount(reported);
  }
  RoutedWork sum = entry.sum;
  sum.total = entry.total;
  return sum;
}

}  // namespace tandem::router
