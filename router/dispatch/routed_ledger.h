// The difference between a worker's last load report and now, as far as this router caused it: what
// it routed there since, and what has ended since. A burst of requests between two reports spreads
// instead of landing on the worker that looked idle, and a worker that just became idle is not
// avoided until it says so.
//
// All of it is asked for at every decision and changes little between two, so the sums are kept and
// not added up each time. Thread-compatible: owned by the dispatcher's thread.
#pragma once

#include <cstdint>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/container/node_hash_map.h"
#include "absl/time/time.h"

#include "router/policy/routing_policy.h"

namespace tandem::router {

class RoutedLedger {
 public:
  // A report cannot be trusted to contain what was routed less than `slack` before it came. What
  // has ended before it came it does contain. What was routed before it came and ended after it
  // counts as contained, however short it was: it all but always is, and a worker that is idle
  // again must not look busy, or a conversation of short turns leaves the worker that holds it.
  explicit RoutedLedger(absl::Duration slack = absl::Milliseconds(50)) : slack_(slack) {}

  // `request` is any number that is unique among requests not yet removed.
  void Add(const std::string& worker, uint64_t request, absl::Time now, const RoutedWork& work);
  // The worker did not take it after all.
  void Remove(uint64_t request);
  // The request has run and ended.
  void End(uint64_t request, absl::Time now);
  // What a report that came at `reported` does not contain: sums are negative where more ended than
  // began.
  RoutedWork Since(const std::string& worker, absl::Time reported);

 private:
  struct Entry {
    absl::Time began;
    absl::Time ended = absl::InfiniteFuture();
    RoutedWork work;
  };
  struct Worker {
    absl::flat_hash_map<uint64_t, Entry> entries;  // by request
    uint64_t total = 0;
    // Of all entries, for the report that came then: what Since() answers until the next one.
    absl::Time reported = absl::InfinitePast();
    RoutedWork sum;
    absl::Time forgot = absl::InfinitePast();  // when what no report confirmed was last dropped
  };
  // Drops what ended before that, and adds the rest up.
  void Recount(absl::Time ended_before, Worker* worker) const;
  // Adds an entry to the worker's sum, with `sign` +1, or takes it out, with -1.
  void Count(const Entry& entry, int sign, Worker* worker) const;

  const absl::Duration slack_;
  absl::node_hash_map<std::string, Worker> workers_;
  absl::flat_hash_map<uint64_t, absl::InlinedVector<Worker*, 2>> places_;  // of what has not ended
};

}  // namespace tandem::router
