// What the loop knows of its own speed. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>

#include "absl/time/time.h"

#include "common/base/rate_meter.h"

namespace tandem::decode {

class LoadMeter {
 public:
  // One batch: `decode_steps` sequences drew one token each, `chunk_tokens` prompt tokens were
  // computed.
  void AddStep(int decode_steps, int chunk_tokens, absl::Duration took);
  double DecodeStepMilliseconds() const;  // median of the recent batches that had decode steps
  const RateMeter& prefill_rate() const { return prefill_rate_; }

 private:
  std::array<float, 64> step_ms_ = {};  // ring
  size_t num_steps_ = 0;
  RateMeter prefill_rate_;  // of batches that are mostly prefill
};

}  // namespace tandem::decode
