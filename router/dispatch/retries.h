// What one request has learned of workers that did not serve it: which ones to avoid, until
// when, how long to wait before the next try, and when to give up.
//
// A plain value; not thread-safe. A worker that was full is avoided until it reports the room that
// the request needs; a lost one for a moment, in which the registry notices that it is gone, and
// for longer each time that the same process is lost again. And because a report may promise what
// is gone a moment later, refusals one after the other make the request wait longer each time,
// whichever worker they came from.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/refusal.h"
#include "router/dispatch/loss.h"
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
  // And how many calls may break in all, though every worker lives.
  static constexpr int kMaxBroken = 20;
  // Fewer, if they have done so for this long: nobody waits half a minute for a worker that breaks
  // whatever it is given.
  static constexpr int kMaxBrokenSlowly = 5;
  static constexpr absl::Duration kMaxBrokenFor = absl::Seconds(10);

  // The decode worker of `route` was lost with the request.
  void AddLost(const Route& route, absl::Time now);
  // It lives, and did not take the request.
  void AddRefused(const Route& route, const Refusal& refusal, absl::Time now);

  // Looks what has become of the lost. Those that live do not count as lost.
  void LookFor(const ClusterView& view);

  bool empty() const { return avoided_.empty() && refusals_ == 0; }
  // Processes; one that was lost twice counts once.
  int lost() const;
  // Calls; all of them count.
  int broken() const { return broken_; }
  bool broken_too_often() const {
    return broken_ >= kMaxBroken ||
           (broken_ >= kMaxBrokenSlowly && last_broken_ - first_broken_ >= kMaxBrokenFor);
  }
  bool may_try_again() const { return lost() <= kMaxLost && !broken_too_often(); }
  // It may not, but some of the lost may yet turn out to live.
  bool in_doubt() const;
  // Workers that may still be lost with the request.
  int may_lose() const { return kMaxLost + 1 - lost(); }
  // Of the last AddLost or AddRefused.
  std::span<const Loss> last_losses() const { return last_losses_; }
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
    uint64_t incarnation = 0;
    Exclusion why = Exclusion::kNone;
    int needed = 0;       // kFull: blocks
    bool remote = false;  // kFull: for a prompt that is computed elsewhere
    absl::Time reported;  // kFull: Route::reported
    absl::Time until;     // no longer than that
  };
  struct Lost {
    Loss loss;
    Fate fate = Fate::kUnknown;
    int times = 0;
  };
  void Avoid(const Route& route, Avoided avoided);
  void Avoid(Avoided avoided);
  // Returns how often this process has been lost.
  int Lose(const Route::Worker& worker, absl::Time now);

  std::vector<Avoided> avoided_;  // at most one per worker
  std::vector<Lost> lost_;        // one per process
  std::vector<Loss> last_losses_;
  int broken_ = 0;
  absl::Time first_broken_, last_broken_;
  int refusals_ = 0;
  bool remote_ = false;
  absl::Time held_until_ = absl::InfinitePast();
};

}  // namespace tandem::router
