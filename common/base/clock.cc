#include "common/base/clock.h"

#include <chrono>

namespace tandem {
namespace {

class RealClock : public Clock {
 public:
  absl::Time Now() override {
    // steady_clock, so that a stepped wall clock cannot turn a stage negative.
    return absl::UnixEpoch() +
           absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
  }
};

}  // namespace

Clock* Clock::Real() {
  static RealClock* clock = new RealClock;
  return clock;
}

}  // namespace tandem
