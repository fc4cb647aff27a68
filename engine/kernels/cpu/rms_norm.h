// Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467).
#pragma once

#include <cstddef>

#include "engine/device/cpu/threads.h"

namespace tandem::engine {

// out[r][c] = x[r][c] / sqrt(mean_c(x[r]^2) + epsilon) * weight[c]. x, out: [rows][width]; may be
// the same.
void RmsNorm(const float* x, const float* weight, float epsilon, size_t rows, size_t width,
             float* out, Threads* threads);

// The same over each of `heads` heads of each row, in place, all with the one `weight` of head_dim.
// x: [rows] at `stride` elements, each starting with [heads][head_dim].
void RmsNormHeads(float* x, size_t rows, size_t stride, size_t heads, size_t head_dim,
                  const float* weight, float epsilon, Threads* threads);

}  // namespace tandem::engine
