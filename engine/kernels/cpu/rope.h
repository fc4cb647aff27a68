// The rotation of rotary position embedding; its frequencies are engine/kernels/rope.h's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/device/cpu/threads.h"

namespace tandem::engine {

// cos, sin: [count][head_dim / 2], of positions[i] * frequency times `scale` (the attention
// factor).
void RopeTables(const float* frequencies, int head_dim, float scale, const int32_t* positions,
                size_t count, float* cos, float* sin, Threads* threads);

// Rotates `heads` heads of each row in place, pairing element i with i + head_dim / 2. x: [rows] at
// `stride` elements, each starting with [heads][head_dim].
void ApplyRope(float* x, size_t rows, size_t stride, int heads, int head_dim, const float* cos,
               const float* sin, Threads* threads);

}  // namespace tandem::engine
