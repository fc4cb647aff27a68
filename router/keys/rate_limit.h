// How much somebody may still have this minute: a bucket that holds one minute's worth, but at
// least one, is full at first, and fills evenly. Times are given, and may stand still.
//
// What is taken may be more than there is: the cost of a request is known only when it is over. The
// bucket is then in debt, and who asks waits until that is paid, so the rate holds in the long run.
//
// Not thread-safe; plain values.
#pragma once

#include <algorithm>

#include "absl/time/time.h"

namespace tandem::router {

class RateLimit {
 public:
  // 0: no limit.
  explicit RateLimit(double per_minute = 0) : per_minute_(per_minute), level_(Size()) {}

  // Until one more may be taken; zero: now.
  absl::Duration Wait(absl::Time now);
  void Take(double amount, absl::Time now);
  // Another limit from now on. What was taken stays taken.
  void SetRate(double per_minute, absl::Time now);

 private:
  double Size() const { return std::max(per_minute_, 1.0); }
  void Fill(absl::Time now);

  double per_minute_;
  double level_;  // below 0: debt
  absl::Time filled_ = absl::InfinitePast();
};

}  // namespace tandem::router
