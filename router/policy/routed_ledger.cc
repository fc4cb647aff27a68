#include "router/policy/routed_ledger.h"

#include <algorithm>

namespace tandem {

void RoutedLedger::Add(const std::string& worker, uint64_t request, absl::Time now,
                       const AssignedWork& work) {
  Worker& entry = workers_[worker];
  entry.entries.push_back({request, now, work});
  ++entry.total;
}

void RoutedLedger::Remove(uint64_t request) {
  for (auto& [id, worker] : workers_) {
    std::erase_if(worker.entries, [&](const Entry& e) { return e.request == request; });
  }
}

AssignedWork RoutedLedger::Since(const std::string& worker, absl::Time reported) {
  AssignedWork sum;
  const auto it = workers_.find(worker);
  if (it == workers_.end()) return sum;
  std::deque<Entry>& entries = it->second.entries;
  while (!entries.empty() && entries.front().time < reported - slack_) entries.pop_front();
  for (const Entry& entry : entries) {
    sum.sequences += entry.work.sequences;
    sum.blocks += entry.work.blocks;
    sum.prefill_tokens += entry.work.prefill_tokens;
  }
  sum.total = it->second.total;
  return sum;
}

}  // namespace tandem
