// How fast a worker computes prompts, refitted with every batch. Not thread-safe.
//
// RateMeter says what a prompt costs that comes alone, SaturatedRate how fast a queue of prompts
// goes down.
#pragma once

#include <cstdint>

#include "absl/time/time.h"

namespace tandem {

// Sums of tokens and of seconds fade at the same pace, so that big batches weigh more than small
// ones, as they do in a prompt's duration. A batch of few tokens mostly measures what any batch
// costs, whatever it holds: it counts only as long as no larger one was seen.
class RateMeter {
 public:
  void AddStep(int tokens, absl::Duration took) {
    const bool large = tokens >= kLargeBatch;
    if (!large && seen_large_) return;
    if (large && !seen_large_) tokens_ = seconds_ = 0;
    seen_large_ = large;
    tokens_ = kKeep * tokens_ + tokens;
    seconds_ = kKeep * seconds_ + absl::ToDoubleSeconds(took);
  }
  // 0: not known yet.
  double TokensPerSecond() const { return seconds_ > 0 ? tokens_ / seconds_ : 0; }
  // What that rests on: the tokens of the last ten batches or so.
  double Tokens() const { return tokens_; }

 private:
  static constexpr double kKeep = 0.9;
  static constexpr int kLargeBatch = 64;  // tokens
  bool seen_large_ = false;
  double tokens_ = 0;
  double seconds_ = 0;
};

// Only batches that are well filled say it, as they are where prompts wait: what a batch costs
// whatever it holds makes the others look many times slower. The first one pays for what is made at
// first use, and is left out.
class SaturatedRate {
 public:
  // Of at most `limit` tokens.
  void AddStep(int tokens, int limit, absl::Duration took) {
    if (tokens < limit / 4 || ++batches_ == 1) return;
    tokens_ = kKeep * tokens_ + tokens;
    seconds_ = kKeep * seconds_ + absl::ToDoubleSeconds(took);
  }
  // 0: not known yet.
  double TokensPerSecond() const {
    return batches_ > kLeastBatches && seconds_ > 0 ? tokens_ / seconds_ : 0;
  }

 private:
  static constexpr double kKeep = 0.9;
  static constexpr int64_t kLeastBatches = 3;
  int64_t batches_ = 0;
  double tokens_ = 0;
  double seconds_ = 0;
};

}  // namespace tandem
