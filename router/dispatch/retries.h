// What one request has learned of workers that did not serve it: which ones to avoid, until
// when, how long to wait before the next try, and when to give up.
//
// A plain value; not thread-safe. A worker that was full is avoided until it reports the room that
// the request needs; a lost one for a moment, in which the registry notices that it is gone. And
// because a report may promise what is gone a moment later, refusals one after the other make the
// request wait longer each time, whichever worker they came from.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/refusal.h"
#include "router/policy/routing_policy.h"

namespace tandem::router {

// Whether a call that ended so may have failed because its worker is gone. INTERNAL is not such an
// end: a worker that lives has said it, and another would compute the same.
bool MayBeLost(const absl::Status& status);

class Retries {
 public:
  // How many workers may be lost with a request that is then sent to another one: what kills two
  // would kill a third.
  static constexpr int kMaxLost = 1;

  // The decode worker of `route` was lost with the request.
  void AddLost(const Route& route, absl::Time now);
  // It lives, and did not take the request.
  void AddRefused(const Route& route, const Refusal& refusal, absl::Time now);

  bool empty() const { return avoided_.empty() && refusals_ == 0; }
  int lost() const { return lost_; }
  bool may_try_again() const { return lost_ <= kMaxLost; }
  // Workers that may still be lost with the request.
  int may_lose() const { return kMaxLost + 1 - lost_; }
  // Whether some lost or leaving worker is remembered, avoided or not.
  bool HasLost() const;
  // Whether the last refusal was of a prompt that a prefill worker was to compute.
  bool remote() const { return remote_; }
  // No try before this, anywhere.
  absl::Time held_until() const { return held_until_; }

  Exclusion ExclusionOf(const WorkerView& worker, absl::Time now) const;
  // When a hold or an exclusion will end by itself; InfiniteFuture: none will.
  absl::Time NextChange(absl::Time now) const;

 private:
  struct Avoided {
    std::string worker;
    std::optional<uint64_t> incarnation;  // of a prefill worker the route says none: any
    Exclusion why = Exclusion::kNone;
    int needed = 0;       // kFull: blocks
    bool remote = false;  // kFull: for a prompt that is computed elsewhere
    absl::Time reported;  // kFull: Route::reported
    absl::Time until;     // no longer than that
  };
  void Avoid(const Route& route, Avoided avoided);
  void Avoid(Avoided avoided);

  std::vector<Avoided> avoided_;  // at most one per worker
  int lost_ = 0;
  int refusals_ = 0;
  bool remote_ = false;
  absl::Time held_until_ = absl::InfinitePast();
};

}  // namespace tandem::router
