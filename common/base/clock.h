// Time as an interface, so that tests own it. Monotonic, and close to wall-clock time: good for
// stages and for deadlines.
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
