// How fast this worker computes prompts, refitted with every batch. Not thread-safe.
#pragma once

#include "absl/time/time.h"

namespace tandem {

class RateMeter {
 public:
  // Sums of tokens and of seconds fade at the same pace, so that big batches weigh more than small
  // ones, as they do in a prompt's duration.
  void AddStep(int tokens, absl::Duration took) {
    tokens_ = kKeep * tokens_ + tokens;
    seconds_ = kKeep * seconds_ + absl::ToDoubleSeconds(took);
  }
  // 0: not known yet.
  double TokensPerSecond() const { return seconds_ > 0 ? tokens_ / seconds_ : 0; }

 private:
  static constexpr double kKeep = 0.9;
  double tokens_ = 0;
  double seconds_ = 0;
};

}  // namespace tandem
