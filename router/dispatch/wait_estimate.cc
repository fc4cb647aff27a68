#include "router/dispatch/wait_estimate.h"

#include <algorithm>
#include <cmath>

namespace tandem::router {
namespace {

constexpr double kMemorySeconds = 5;
// A queue that has stood for less, or has let fewer go, says nothing yet.
constexpr double kLeastSeconds = 0.5;
constexpr double kLeastRequests = 3;
// So many are remembered while it stands.
constexpr double kKeptRequests = 4;

}  // namespace

void WaitEstimate::Observe(absl::Time now, int requests, int64_t tokens, bool waiting) {
  const double passed = std::max(0.0, absl::ToDoubleSeconds(now - last_));
  double kept = std::exp(-passed / kMemorySeconds);
  if (standing_) {
    kept = std::max(kept, std::min(1.0, kKeptRequests / std::max(requests_, 1.0)));
    busy_seconds_ = busy_seconds_ * kept + passed * (1 + kept) / 2;
    requests_ = requests_ * kept + requests;
    tokens_ = tokens_ * kept + static_cast<double>(tokens);
  } else {
    // What leaves now has found room at once.
    busy_seconds_ *= kept;
    requests_ *= kept;
    tokens_ *= kept;
  }
  last_ = now;
  standing_ = waiting;
  const bool known =
      standing_ && busy_seconds_ >= kLeastSeconds && requests_ >= kLeastRequests && tokens_ >= 1;
  seconds_per_request_ = known ? busy_seconds_ / requests_ : 0;
  seconds_per_token_ = known ? busy_seconds_ / tokens_ : 0;
}

absl::Duration WaitEstimate::Behind(int requests, int64_t tokens) const {
  return absl::Seconds(std::min(requests * seconds_per_request_.load(),
                                static_cast<double>(tokens) * seconds_per_token_.load()));
}

}  // namespace tandem::router
