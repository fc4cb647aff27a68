#include "decode_worker/load_meter.h"

#include <algorithm>
#include <vector>

namespace tandem::decode {

void LoadMeter::AddStep(int decode_steps, int chunk_tokens, absl::Duration took) {
  if (decode_steps > 0) {
    step_ms_[num_steps_++ % step_ms_.size()] = static_cast<float>(absl::ToDoubleMilliseconds(took));
  }
  if (chunk_tokens <= decode_steps) return;
  prefill_rate_.AddStep(chunk_tokens + decode_steps, took);
  saturated_rate_.AddStep(chunk_tokens + decode_steps, max_tokens_, took);
}

double LoadMeter::DecodeStepMilliseconds() const {
  const size_t count = std::min(num_steps_, step_ms_.size());
  if (count == 0) return 0;
  std::vector<float> recent(step_ms_.begin(), step_ms_.begin() + static_cast<ptrdiff_t>(count));
  auto middle = recent.begin() + static_cast<ptrdiff_t>(count / 2);
  std::nth_element(recent.begin(), middle, recent.end());
  return *middle;
}

}  // namespace tandem::decode
