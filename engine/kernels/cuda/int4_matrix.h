// Weights of 4 bits in the form that int4_linear.h reads, and the way back to bfloat16.
//
//   weight[output][input] = scale[output][group of input] * (value[output][input] - zero point)
//
// A group is 32, 64 or 128 neighbouring inputs, or all of them. Its scale and zero point share a
// word (ScaleWord() of int4_rows.h).
//
// The form. Two rows (Int4Pairs; kRows: tile i has rows [2 * height * i, ...), half of them as its
// first rows) of the weight make a pair: those whose results an epilogue needs together.
// `height` pairs make a tile, the sixteen rows of one tensor core product: the first rows of its
// pairs, then the second ones. A tile has, for each block of 128 inputs, 2 * 4 * height pieces of
// 16 bytes: for each half of the block and each of 4 * height lanes what the lane wants in its
// registers for four products. Rows that tiles have beyond the last pair, and inputs beyond the
// last one, are zeros, as are their scales.
//
// Lane (g, t) of half block c has, in word s, its part of the A side of a product of 16 x 16
// values, the rows of the tile and inputs [64 c + 16 s, ... + 16): of rows g and g + 8 the inputs 2
// t, 2 t + 1, 2 t + 8 and 2 t + 9 among them. Four bits of register i of that side are the word's
// bits [4 i, 4 i + 4) and [4 i + 16, 4 i + 20), lower input first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/int4_rows.h"

namespace tandem::engine::cuda {

inline constexpr int kInt4Block = 128;    // inputs
inline constexpr int kInt4Half = 64;      // of a block
inline constexpr int kInt4MaxHeight = 8;  // pairs of a tile
inline constexpr int kInt4ScaleWords =
    16;  // of a tile and a group: its pairs, first row and second

// The weights of a linear layer, in memory of the device.
struct Int4Matrix {
  const uint4* values = nullptr;     // Int4Layout::ValueBytes()
  const uint32_t* scales = nullptr;  // Int4Layout::ScaleBytes()
  int height = 0, tiles = 0;
  int blocks = 0;  // of inputs
  int groups = 0;
  int sets = 0;  // of scales that a block has: 1, 2 or 4
};

// How the weights of a shape are laid out. Tiles are as high as lets an equal number of them for
// each multiprocessor cover the pairs.
struct Int4Layout {
  Int4Pairs pairs = Int4Pairs::kRows;
  int head_dim = 0;  // for kHeads
  int outputs = 0, inputs = 0;
  int group_size = 0;  // 32, 64, 128 or `inputs`
  int height = 0, tiles = 0, blocks = 0, groups = 0, sets = 0;

  static Int4Layout Of(Int4Pairs pairs, int head_dim, int outputs, int inputs, int group_size,
                       int multiprocessors);
  // Both are multiples of 16.
  size_t ValueBytes() const {
    return static_cast<size_t>(tiles) * static_cast<size_t>(blocks) * static_cast<size_t>(height) *
           kInt4Block;
  }
  size_t ScaleBytes() const {
    return static_cast<size_t>(tiles) * static_cast<size_t>(groups) * kInt4ScaleWords *
           sizeof(uint32_t);
  }
  Int4Matrix At(const void* values, const void* scales) const {
    return {static_cast<const uint4*>(values),
            static_cast<const uint32_t*>(scales),
            height,
            tiles,
            blocks,
            groups,
            sets};
  }
};

// Puts rows [first_row, first_row + rows) where they belong. Both arrays were zeroed before the
// first call. The sources may lie in memory of the host that the device can read.
//   rows_of_values: [rows][(inputs + 7) / 8] words of eight values, the lowest bits first
//   rows_of_scales: [rows][groups], ScaleWord()
cudaError_t PackInt4Rows(const Int4Layout& layout, const uint32_t* rows_of_values,
                         const uint32_t* rows_of_scales, int first_row, int rows, void* values,
                         void* scales, cudaStream_t stream);

// out[outputs][inputs] = the weights, each rounded to bfloat16 once. `inputs` is a multiple of 8.
// `order`: null, or packed input j is input order[j] of `out`.
cudaError_t DequantiseInt4(const Int4Layout& layout, const Int4Matrix& matrix, const int32_t* order,
                           __nv_bfloat16* out, const LaunchOptions& options);

// out[row][j] = x[row][order[j]]: activations for a matrix that was packed in that order.
cudaError_t GatherInputs(const __nv_bfloat16* x, const int32_t* order, int rows, int inputs,
                         __nv_bfloat16* out, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
