// What the matrix products share: arguments, and one function per instruction set.
#pragma once

#include <cstddef>

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

}  // namespace tandem
