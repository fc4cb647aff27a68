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
             place.index * 2 + place.second] =
          rows_of_scales[static_cast<int64_t>(row) * layout.groups + group];
      continue;
    }
    // Inputs k .. k + 7 are one half of a product's: four lanes take two of them each.
    const uint32_t source = rows_of_values[static_cast<int64_t>(row) * words + word];
    const int k = word * kWordValues, half = k / kInt4Half, product = k % kInt4Half / 16;
    const int place_in_word = 4 * (place.second + k % 16 / 8 * 2);
    uint32_t* to =
        values +
        (((static_cast<int64_t>(place.tile) * layout.blocks * 2 + half) * (4 * layout.height) +
          place.index * 4) *
             4 +
         product);
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      uint32_t q[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        q[j] = k + 2 * t + j < layout.inputs ? source >> (8 * t + 4 * j) & 15 : 0;
      }
      // Others have the other bits of this word.
      atomicOr(to + 4 * t, (q[0] | q[1] << 16) << place_in_word);
    }
  }
}

// Four lanes that are neighbours have four words each: lane t gets word t of all of them, in their
// order.
__device__ void ExchangeWords(uint32_t (&words)[4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = (t & step) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const uint32_t given = upper ? words[i] : words[i + step];
      const uint32_t taken = __shfl_xor_sync(~0u, given, step);
      words[i] = upper ? taken : words[i];
      words[i + step] = upper ? words[i + step] : taken;
    }
  }
}

// A thread takes the 32 values of a lane, and after the exchange leaves two runs of eight inputs of
// two rows. Runs of four neighbours lie side by side.
__global__ __launch_bounds__(kThreads) void DequantiseKernel(Int4Layout layout, Int4Matrix matrix,
                                                             const int32_t* order,
                                                             __nv_bfloat16* out) {
  WaitForPredecessor();
  LetSuccessorStart();
  const int lanes = 4 * layout.height, tile = static_cast<int>(blockIdx.x);
  const int count = layout.blocks * 2 * lanes;
  const uint4* values = matrix.values + static_cast<int64_t>(tile) * count;
  const int step = static_cast<int>(gridDim.y) * kThreads;
  // Whole warps go on: they exchange words. `count` is a multiple of 4.
  for (int first = static_cast<int>(blockIdx.y) * kThreads; first < count; first += step) {
    const int i = first + static_cast<int>(threadIdx.x);
    const bool inside = i < count;
    const int lane = i % lanes, half = i / lanes;
    const uint4 loaded = inside ? __ldcs(values + i) : make_uint4(0, 0, 0, 0);
    // Run c of a half block is half of product c / 2. In words[c]: this lane's two inputs of runs c
    // and 4 + c, of each input a byte with both rows.
    uint32_t words[4] = {
        __byte_perm(loaded.x, loaded.z, 0x6420), __byte_perm(loaded.x, loaded.z, 0x7531),
        __byte_perm(loaded.y, loaded.w, 0x6420), __byte_perm(loaded.y, loaded.w, 0x7531)};
    ExchangeWords(words);
    if (!inside) continue;
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int row = RowAt(layout, {tile, second, lane / 4});
      if (row >= layout.outputs) continue;
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        const int k = half * kInt4Half + run * 32 + i % 4 * 8;
        if (k >= layout.inputs) continue;
        const uint32_t word = __ldg(
            matrix.scales +
            (static_cast<int64_t>(tile) * layout.groups + k / layout.group_size) * kInt4ScaleWords +
            lane / 4 * 2 + second);
        const float scale = __uint_as_float(word & ~15u);
        const float zero = static_cast<float>(word & 15);
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // inputs k + 2 j and the next
          const uint32_t source = words[j] >> (16 * run + 4 * second);
          pairs[j] = PackBFloat16(scale * (static_cast<float>(source & 15) - zero),
                                  scale * (static_cast<float>(source >> 8 & 15) - zero));
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
