#include "router/dispatch/wait_estimate.h"

#include <algorithm>
#include <cmath>

namespace tandem::router {
namespace {

constexpr double kMemorySeconds = 5;
// A queue that has stood for less says nothing yet.
constexpr double kLeastSeconds = 0.5;

}  // namespace

void WaitEstimate::Observe(absl::Time now, int requests, int64_t tokens, bool waiting) {
  if (last_ <= now) {
    const double passed = absl::ToDoubleSeconds(now - last_);
    const double kept = std::exp(-passed / kMemorySeconds);
    busy_seconds_ = busy_seconds_ * kept + kMemorySeconds * (1 - kept);
    requests_ = requests_ * kept + requests;
    tokens_ = tokens_ * kept + static_cast<double>(tokens);
  }
  last_ = waiting ? now : absl::InfiniteFuture();
  if (busy_seconds_ < kLeastSeconds) return;
  seconds_per_request_ = busy_seconds_ / std::max(requests_, 1e-3);
  seconds_per_token_ = busy_seconds_ / std::max(tokens_, 1e-3);
}

absl::Duration WaitEstimate::Behind(int requests, int64_t tokens) const {
  return absl::Seconds(std::max(requests * seconds_per_request_.load(),
                                static_cast<double>(tokens) * seconds_per_token_.load()));
}

}  // namespace tandem::router
