// The gate of a SwiGLU feed-forward block (Shazeer, 2020, arXiv:2002.05202).
#pragma once

#include <cstddef>

#include "engine/kernels/threads.h"

namespace tandem::engine {

// gate_up: [rows][2 * width], gate first. Writes silu(gate) * up over the gate half of each row, so
// that the result has rows of `width` elements, 2 * width apart.
void SiluMul(float* gate_up, size_t rows, size_t width, Threads* threads);

}  // namespace tandem::engine
