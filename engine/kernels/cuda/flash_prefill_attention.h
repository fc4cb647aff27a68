// What prefill_attention.h does not show of FlashPrefillAttention, for its tests.
#pragma once

#include "engine/kernels/cuda/prefill_attention.h"

namespace tandem::engine::cuda {

// In steps of `step` positions: 64, or 32 with head_dim 128. The function without `step` chooses by
// the device's shared memory.
cudaError_t FlashPrefillAttention(const PrefillAttentionArgs& args, const LaunchOptions& options,
                                  int step);

}  // namespace tandem::engine::cuda
