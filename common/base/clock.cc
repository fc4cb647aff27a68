#include "common/base/clock.h"

#include <chrono>

namespace tandem {
namespace {

using SteadyClock = std::chrono::steady_clock;

// Wall-clock time when the process first asked, plus what the steady clock has counted since:
// comparable with deadlines that come over the wire, yet a stepped wall clock cannot turn a stage
// negative.
class RealClock : public Clock {
 public:
  absl::Time Now() override { return wall_ + absl::FromChrono(SteadyClock::now() - steady_); }

 private:
  const absl::Time wall_ = absl::Now();
  const SteadyClock::time_point steady_ = SteadyClock::now();
};

}  // namespace

Clock* Clock::Real() {
  static RealClock* clock = new RealClock;
  return clock;
}

}  // namespace tandem
