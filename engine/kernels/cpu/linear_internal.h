// What the matrix products share: arguments, and one function per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/kernels/linear.h"

namespace tandem {

struct LinearArgs {
  const PackedMatrix* w;
  const float* bias;  // [n] or null
  const float* x;     // [rows] at x_stride, each [k]
  size_t x_stride;
  size_t rows;
  float* y;  // [rows] at y_stride, each [n]
  size_t y_stride;
};

// Computes the output columns of panels [panel_begin, panel_end).
void LinearFloat32Panels(const LinearArgs& args, size_t panel_begin, size_t panel_end);

// The next two need CpuHasBF16().
// out: [rows][padded], zero beyond k.
void RoundToBF16(const float* x, size_t x_stride, size_t rows, size_t k, size_t padded,
                 uint16_t* out);
// `x`: args.x as written by RoundToBF16.
void LinearBF16Panels(const LinearArgs& args, const uint16_t* x, size_t padded, size_t panel_begin,
                      size_t panel_end);

}  // namespace tandem
