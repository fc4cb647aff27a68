// What the loop knows of its own load and speed. Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "absl/time/time.h"

#include "common/base/rate_meter.h"
#include "engine/kv/block_pool.h"

namespace tandem::decode {

struct LoadSnapshot {
  int running = 0;
  int waiting = 0;             // for a prefill elsewhere, or preempted
  int64_t waiting_tokens = 0;  // to prefill here
  engine::BlockPoolCounts blocks;
  double prefill_tokens_per_second = 0;  // 0: not known yet
  double decode_step_milliseconds = 0;   // recent median; 0: not known yet
};

class LoadMeter {
 public:
  // One batch: `decode_steps` sequences drew one token each, `chunk_tokens` prompt tokens were
  // computed.
  void AddStep(int decode_steps, int chunk_tokens, absl::Duration took);
  double DecodeStepMilliseconds() const;  // median of the recent batches that had decode steps
  double PrefillTokensPerSecond() const { return prefill_rate_.TokensPerSecond(); }

 private:
  std::array<float, 64> step_ms_ = {};  // ring
  size_t num_steps_ = 0;
  RateMeter prefill_rate_;  // of batches that are mostly prefill
};

}  // namespace tandem::decode
