// The gate of a SwiGLU feed-forward block (Shazeer, 2020, arXiv:2002.05202).
#pragma once

#include <cstddef>

#include "engine/device/cpu/threads.h"

namespace tandem::engine {

// out = silu(gate) * up. gate_up: [rows][2 * width], gate first; out: [rows][width].
void SiluMul(const float* gate_up, size_t rows, size_t width, float* out, Threads* threads);

}  // namespace tandem::engine
