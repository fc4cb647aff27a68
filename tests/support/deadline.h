// Points in time that a test waits until.
#pragma once

#include <chrono>

namespace tandem {

using SteadyClock = std::chrono::steady_clock;

inline SteadyClock::time_point After(double seconds) {
  return SteadyClock::now() +
         std::chrono::duration_cast<SteadyClock::duration>(std::chrono::duration<double>(seconds));
}

// Negative when it has passed.
inline double SecondsUntil(SteadyClock::time_point end) {
  return std::chrono::duration<double>(end - SteadyClock::now()).count();
}

}  // namespace tandem
