// Requests whose prompt is to be computed elsewhere and cannot be asked for yet (PrefillWindow).
//
// They hold neither slot nor block. What they will need is promised to them: no request that would
// wait as they do is taken on top of it, but what is computed here may use it meanwhile. Only once
// the first of them could be asked for, and has lacked the room for a while, is it held back from
// those too, so that a stream of small requests starves nobody.
//
// Not thread-safe: part of the loop.
#pragma once

#include <cstdint>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "decode_worker/admission.h"
#include "decode_worker/event.h"

namespace tandem::decode {

class PrefillBacklog {
 public:
  // How long a request may lack room that others take.
  static constexpr absl::Duration kPatience = absl::Seconds(1);

  struct Waiting {
    WorkArrived request;
    Placement place;                                 // when it came
    absl::Time lacks_room = absl::InfiniteFuture();  // since then: its turn has come

    const std::string& worker() const { return request.work.prefill.front().worker_id; }
  };
  using List = std::list<Waiting>;

  // Behind all of the same or a higher priority.
  void Insert(WorkArrived request, const Placement& place);
  // In the order of their turns.
  List& waiting() { return waiting_; }
  // Takes it out.
  WorkArrived Take(List::iterator waiting);
  // Takes those out that `which` is true of.
  template <typename Which>
  std::vector<WorkArrived> TakeIf(Which which);

  bool empty() const { return waiting_.empty(); }
  int size() const { return promised_.sequences; }
  // What all of them will need.
  const Promised& promised() const { return promised_; }
  // The part of it that nobody else may take.
  Promised HeldBack(absl::Time now) const;
  // Tokens that each prefill worker will be asked for.
  std::map<std::string, int64_t> Tokens() const;

 private:
  List waiting_;
  Promised promised_;
};

template <typename Which>
std::vector<WorkArrived> PrefillBacklog::TakeIf(Which which) {
  std::vector<WorkArrived> out;
  for (auto it = waiting_.begin(); it != waiting_.end();) {
    const auto next = std::next(it);
    if (which(it->request.work)) out.push_back(Take(it));
    it = next;
  }
  return out;
}

}  // namespace tandem::decode
