// What one request has learned of decode workers that did not serve it: which ones to avoid, for
// how long, and when to give up.
//
// A plain value; not thread-safe. A full worker is avoided until it reports again, because the
// report may show room; a lost one for a moment, in which the registry notices that it is gone.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "router/policy/routing_policy.h"

namespace tandem::router {

// Whether a call that ended so may have failed because of its worker, not because of the request.
bool MayBeLost(const absl::Status& status);

class Retries {
 public:
  // How often a request whose worker was lost is sent to another one.
  static constexpr int kMaxLost = 3;

  enum class Kind { kLost, kFull };

  // The decode worker of `route` did not serve the request.
  void Add(Kind kind, const Route& route, absl::Time now);

  bool empty() const { return refusals_.empty(); }
  int lost() const { return lost_; }
  bool may_try_again() const { return lost_ < kMaxLost; }
  // Whether some lost worker is remembered, avoided or not.
  bool HasLost() const;

  Exclusion ExclusionOf(const WorkerView& worker, absl::Time now) const;
  // When an exclusion will end by itself; InfiniteFuture: none will.
  absl::Time NextChange(absl::Time now) const;

 private:
  struct Refusal {
    Kind kind;
    std::string worker;
    uint64_t incarnation;
    absl::Time reported;  // Route::reported
    absl::Time until;     // avoided no longer than that
  };

  std::vector<Refusal> refusals_;  // at most one per worker
  int lost_ = 0;
};

}  // namespace tandem::router
