// What the loop knows of its own speed. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>

#include "absl/time/time.h"

#include "common/base/rate_meter.h"

namespace tandem::decode {

class LoadMeter {
 public:
  // Of batches of at most so many tokens.
  explicit LoadMeter(int max_num_batched_tokens) : max_tokens_(max_num_batched_tokens) {}

  // One batch: `decode_steps` sequences drew one token each, `chunk_tokens` prompt tokens were
  // computed.
  void AddStep(int decode_steps, int chunk_tokens, absl::Duration took);
  double DecodeStepMilliseconds() const;  // median of the recent batches that had decode steps
  const RateMeter& prefill_rate() const { return prefill_rate_; }
  const SaturatedRate& saturated_rate() const { return saturated_rate_; }

 private:
  const int max_tokens_;
  std::array<float, 64> step_ms_ = {};  // ring
  size_t num_steps_ = 0;
  // Of batches that are mostly prefill.
  RateMeter prefill_rate_;
  SaturatedRate saturated_rate_;
};

}  // namespace tandem::decode
