// What was routed to each worker since its last load report, so that a burst of requests between
// two reports spreads instead of landing on the worker that looked idle.
//
// Thread-compatible: owned by the dispatcher's thread.
#pragma once

#include <cstdint>
#include <deque>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"

#include "router/policy/routing_policy.h"

namespace tandem {

class RoutedLedger {
 public:
  // A report cannot be trusted to contain what was routed less than `slack` before it came.
  explicit RoutedLedger(absl::Duration slack = absl::Milliseconds(50)) : slack_(slack) {}

  // `request` is any number that is unique among requests not yet removed.
  void Add(const std::string& worker, uint64_t request, absl::Time now, const AssignedWork& work);
  // The request has ended or left the workers.
  void Remove(uint64_t request);
  // Sum of what was routed to `worker` and is not in a report that came at `reported`.
  AssignedWork Since(const std::string& worker, absl::Time reported);
  void Forget(const std::string& worker) { workers_.erase(worker); }

 private:
  struct Entry {
    uint64_t request;
    absl::Time time;
    AssignedWork work;
  };
  struct Worker {
    std::deque<Entry> entries;  // ascending time
    uint64_t total = 0;
  };

  const absl::Duration slack_;
  absl::flat_hash_map<std::string, Worker> workers_;
};

}  // namespace tandem
