// How long what joins the queue will wait in it, by how fast the queue has moved lately.
//
// Only the time counts in which requests wait: how fast a queue moves that is empty says nothing.
// Thread-safe; Observe belongs to one thread.
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
  // Behind so many. Zero until the queue has moved for a while.
  absl::Duration Behind(int requests, int64_t tokens) const;

 private:
  absl::Time last_ = absl::InfiniteFuture();  // since when there is a queue; future: there is none
  // Of the last seconds, the more distant the less.
  double busy_seconds_ = 0;
  double requests_ = 0;
  double tokens_ = 0;

  std::atomic<double> seconds_per_request_ = 0;
  std::atomic<double> seconds_per_token_ = 0;
};

}  // namespace tandem::router
