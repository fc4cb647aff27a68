// Root mean square normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467).
#pragma once

#include <cstddef>

#include "engine/kernels/threads.h"

namespace tandem {

// out[r][c] = x[r][c] / sqrt(mean_c(x[r]^2) + epsilon) * weight[c]. x, out: [rows][width]; may be
// the same.
void RmsNorm(const float* x, const float* weight, float epsilon, size_t rows, size_t width,
             float* out, Threads* threads);

}  // namespace tandem
