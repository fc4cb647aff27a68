// y = x W^T + b with W packed once.
//
// Packed layout, both types: panels of kPanel output columns; within a panel, all K input elements
// in order, each with its kPanel columns side by side. Columns beyond N and inputs beyond K are
// zero. bfloat16 keeps pairs of inputs together, [panel][K / 2][kPanel][2], which is what
// VDPBF16PS and AMX tiles read.
//
// Order of summation: the same for every output element of a matrix. It does not depend on the
// number of rows, their place in the batch, or the number of threads, so a row's result is
// bit-identical in every batch. float32, and bfloat16 without AMX: one accumulator that runs over K
// in order. bfloat16 with AMX: see cpu/linear_amx.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/device/cpu/threads.h"
#include "engine/kernels/element.h"
#include "engine/kernels/packed_matrix.h"

namespace tandem::engine {

inline constexpr size_t kPanel = 32;     // output columns
inline constexpr size_t kKPadding = 32;  // bfloat16 packs K padded to a multiple of this

// Of PackedMatrix::data, which is aligned to 64 bytes.
size_t PackedBytes(Element element, size_t n, size_t k);

// Packs `rows` rows of a row-major weight [rows][k] as output columns [first_column, first_column +
// rows) of `packed` (zeroed before the first call). Exact for float32; float16 and float32 sources
// are rounded to nearest when packed as bfloat16.
void PackRows(const void* source, Element source_element, size_t rows, size_t k,
              size_t first_column, Element packed_element, void* packed, Threads* threads);

// Bytes of scratch that Linear needs for `rows` rows; 0 for float32 weights.
size_t LinearScratchBytes(Element element, size_t rows, size_t k);

// x: [rows][k] float32, x_stride elements apart; y: [rows][n] float32, y_stride apart; bias: [n] or
// null. bfloat16 weights (where CpuHasBF16()): x is rounded to bfloat16, sums are float32.
void Linear(const PackedMatrix& w, const float* bias, const float* x, size_t x_stride, size_t rows,
            float* y, size_t y_stride, void* scratch, Threads* threads);

}  // namespace tandem::engine
