#include <algorithm>

#include "engine/kernels/cuda/int4_matrix.h"
#include "engine/kernels/cuda/ptx.cuh"

namespace tandem::engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWordValues = 8;  // of a word

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

// Where a row of the weight stands.
struct Place {
  int tile, second, index;  // `index` among the tile's first or second rows
};

__device__ Place PlaceOf(const Int4Layout& layout, int row) {
  if (layout.pairs == Int4Pairs::kRows) {
    const int at = row % (2 * layout.height);
    return {row / (2 * layout.height), at / layout.height, at % layout.height};
  }
  int pair, second;
  if (layout.pairs == Int4Pairs::kHalves) {
    const int half = layout.outputs / 2;
    pair = row % half;
    second = row / half;
  } else {
    const int half = layout.head_dim / 2, element = row % layout.head_dim;
    pair = row / layout.head_dim * half + element % half;
    second = element / half;
  }
  return {pair / layout.height, second, pair % layout.height};
}

// The way back; may lie beyond the last row.
__device__ int RowAt(const Int4Layout& layout, const Place& place) {
  if (layout.pairs == Int4Pairs::kRows) {
    return place.tile * 2 * layout.height + place.second * layout.height + place.index;
  }
  const int pair = place.tile * layout.height + place.index;
  if (2 * pair >= layout.outputs) return layout.outputs;
  if (layout.pairs == Int4Pairs::kHalves) return place.second * (layout.outputs / 2) + pair;
  const int half = layout.head_dim / 2;
  return pair / half * layout.head_dim + place.second * half + pair % half;
}

// A thread takes a word of eight values, or a word of a scale.
__global__ void PackKernel(Int4Layout layout, const uint32_t* rows_of_values,
                           const uint32_t* rows_of_scales, int first_row, int rows,
                           uint32_t* values, uint32_t* scales) {
  const int words = (layout.inputs + kWordValues - 1) / kWordValues;
  const int per_row = words + layout.groups;
  const int64_t count = static_cast<int64_t>(rows) * per_row;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride) {
    const int row = static_cast<int>(i / per_row), word = static_cast<int>(i % per_row);
    const Place place = PlaceOf(layout, first_row + row);
    if (word >= words) {
      const int group = word - words;
      scales[(static_cast<int64_t>(place.tile) * layout.groups + group) * kInt4ScaleWords +
             place.second * 8 + place.index] =
          rows_of_scales[static_cast<int64_t>(row) * layout.groups + group];
      continue;
    }
    const uint32_t source = rows_of_values[static_cast<int64_t>(row) * words + word];
    const int k = word * kWordValues, block = k / kInt4Block, half = k % kInt4Block / 64;
    const int lane = place.index * 4 + k % 32 / 8, words_of_half = k % 64 / 32 * 2;
    uint32_t* to = values +
                   (((static_cast<int64_t>(place.tile) * layout.blocks + block) * 2 + half) *
                        (4 * layout.height) +
                    lane) *
                       4 +
                   words_of_half;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t q[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool inside = k + s * 4 + j < layout.inputs;
        q[j] = inside ? source >> (16 * s + 4 * j) & 15 : 0;
      }
      // The other row of the pair has the other halves of these bytes.
      atomicOr(to + s, (q[0] | q[2] << 8 | q[1] << 16 | q[3] << 24) << (4 * place.second));
    }
  }
}

// A thread takes the 32 values of a lane: two rows of sixteen inputs, in two runs of eight.
__global__ __launch_bounds__(kThreads) void DequantiseKernel(Int4Layout layout, Int4Matrix matrix,
                                                             const int32_t* order,
                                                             __nv_bfloat16* out) {
  WaitForPredecessor();
  LetSuccessorStart();
  const int lanes = 4 * layout.height, tile = static_cast<int>(blockIdx.x);
  const int count = layout.blocks * 2 * lanes;
  const uint4* values = matrix.values + static_cast<int64_t>(tile) * count;
  for (int i = static_cast<int>(blockIdx.y) * kThreads + threadIdx.x; i < count;
       i += static_cast<int>(gridDim.y) * kThreads) {
    const int lane = i % lanes, at = i / lanes, half = at % 2, block = at / 2;
    const uint4 loaded = __ldcs(values + i);
    const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int row = RowAt(layout, {tile, second, lane / 4});
      if (row >= layout.outputs) continue;
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const int k = block * kInt4Block + half * 64 + run * 32 + lane % 4 * 8;
        if (k >= layout.inputs) continue;
        const uint32_t word = __ldg(
            matrix.scales +
            (static_cast<int64_t>(tile) * layout.groups + k / layout.group_size) * kInt4ScaleWords +
            second * 8 + lane / 4);
        const float scale = __uint_as_float(word & ~15u);
        const float zero = static_cast<float>(word & 15);
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // inputs k + 2 j and the next
          const uint32_t source = words[run * 2 + j / 2] >> (4 * second + 8 * (j % 2));
          pairs[j] = PackBFloat16(scale * (static_cast<float>(source & 15) - zero),
                                  scale * (static_cast<float>(source >> 16 & 15) - zero));
        }
        __nv_bfloat16* to = out + static_cast<int64_t>(row) * layout.inputs;
        if (order == nullptr) {
          *reinterpret_cast<uint4*>(to + k) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
          continue;
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const auto bits = static_cast<uint16_t>(pairs[j / 2] >> (16 * (j % 2)));
          to[__ldg(order + k + j)] = __ushort_as_bfloat16(bits);
        }
      }
    }
  }
}

__global__ void GatherKernel(const __nv_bfloat16* x, const int32_t* order, int inputs,
                             __nv_bfloat16* out) {
  WaitForPredecessor();
  LetSuccessorStart();
  const int j = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= inputs) return;
  const int64_t row = static_cast<int64_t>(blockIdx.y) * inputs;
  out[row + j] = x[row + __ldg(order + j)];
}

}  // namespace

Int4Layout Int4Layout::Of(Int4Pairs pairs, int head_dim, int outputs, int inputs, int group_size,
                          int multiprocessors) {
  Int4Layout out;
  out.pairs = pairs;
  out.head_dim = head_dim;
  out.outputs = outputs;
  out.inputs = inputs;
  out.group_size = group_size;
  const int count = CeilDivide(outputs, 2);
  const int rounds = CeilDivide(count, multiprocessors * kInt4MaxHeight);
  out.height = CeilDivide(count, multiprocessors * rounds);
  out.tiles = CeilDivide(count, out.height);
  out.blocks = CeilDivide(inputs, kInt4Block);
  out.groups = CeilDivide(inputs, group_size);
  out.sets = out.groups == 1 ? 1 : std::max(1, kInt4Block / group_size);
  return out;
}

cudaError_t PackInt4Rows(const Int4Layout& layout, const uint32_t* rows_of_values,
                         const uint32_t* rows_of_scales, int first_row, int rows, void* values,
                         void* scales, cudaStream_t stream) {
  PackKernel<<<1024, kThreads, 0, stream>>>(layout, rows_of_values, rows_of_scales, first_row, rows,
                                            static_cast<uint32_t*>(values),
                                            static_cast<uint32_t*>(scales));
  return cudaGetLastError();
}

cudaError_t DequantiseInt4(const Int4Layout& layout, const Int4Matrix& matrix, const int32_t* order,
                           __nv_bfloat16* out, const LaunchOptions& options) {
  const int pieces = layout.blocks * 8 * layout.height;  // of a tile
  const dim3 grid(static_cast<unsigned>(layout.tiles),
                  static_cast<unsigned>(CeilDivide(pieces, 4 * kThreads)));
  return Launch(DequantiseKernel, grid, kThreads, 0, options, layout, matrix, order, out);
}

cudaError_t GatherInputs(const __nv_bfloat16* x, const int32_t* order, int rows, int inputs,
                         __nv_bfloat16* out, const LaunchOptions& options) {
  const dim3 grid(static_cast<unsigned>(CeilDivide(inputs, kThreads)), static_cast<unsigned>(rows));
  return Launch(GatherKernel, grid, kThreads, 0, options, x, order, inputs, out);
}

}  // namespace tandem::engine::cuda
