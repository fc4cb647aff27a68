// Time as an interface, so that tests own it. Monotonic; not wall-clock.
#pragma once

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace tandem {

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual absl::Time Now() = 0;
  // The process's clock; never destroyed.
  static Clock* Real();
};

}  // namespace tandem
