// How long what joins the queue will wait in it, by how fast the queue has moved lately.
//
// Requests are refused by it, so it says nothing where it does not know. Only the time counts in
// which requests stood and waited for room: a queue that is empty after a turn of the dispatcher
// holds back nobody, and how fast one moved some while before it ran empty says nothing either. As
// long as it stands, its last few requests are remembered, however long ago they left. Thread-safe;
// Observe belongs to one thread.
#pragma once

#include <atomic>
#include <cstdint>

#include "absl/time/time.h"

namespace tandem::router {

class WaitEstimate {
 public:
  // So many requests, of so many prompt tokens in all, were sent to workers since the last call;
  // and whether others still wait.
  void Observe(absl::Time now, int requests, int64_t tokens, bool waiting);
  // Behind so many: the lesser of what their number and what their tokens say. Where they are of
  // another length than those that have left, one of the two is far too much. Zero until the queue
  // has moved for a while.
  absl::Duration Behind(int requests, int64_t tokens) const;

 private:
  absl::Time last_ = absl::InfinitePast();  // the last call
  bool standing_ = false;                   // since then
  // Of the last seconds, the more distant the less.
  double busy_seconds_ = 0;
  double requests_ = 0;
  double tokens_ = 0;

  // Zero: not known.
  std::atomic<double> seconds_per_request_ = 0;
  std::atomic<double> seconds_per_token_ = 0;
};

}  // namespace tandem::router
