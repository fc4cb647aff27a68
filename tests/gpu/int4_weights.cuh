// Random 4-bit weights for tests and benchmarks on a GPU: as rows, and packed from them.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kernels/cuda/int4_matrix.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {

static __global__ void FillWords(uint32_t* data, size_t count, uint64_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    const auto half = [&](size_t j) {
      return static_cast<uint32_t>((RandomAt(seed, 2 * i + j) + 1) * 0x1p15f);
    };
    data[i] = half(0) << 16 | half(1);
  }
}

// Scales about `scale`; zero points of 8 where symmetric.
static __global__ void FillScaleWords(uint32_t* data, size_t count, uint64_t seed, float scale,
                                      bool symmetric) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    const float value = scale * (1 + 0.5f * RandomAt(seed, i));
    const uint32_t zero =
        symmetric ? 8 : static_cast<uint32_t>(8 + 7.99f * RandomAt(seed + 1, i)) & 15;
    data[i] = (__float_as_uint(value) & ~15u) | zero;
  }
}

struct Int4Weights {
  Int4Weights() = default;
  // `keep_rows`: rows_of_values and rows_of_scales stay for a reference.
  Int4Weights(const Int4Layout& shape, uint64_t seed, float scale, bool symmetric, bool keep_rows)
      : layout(shape) {
    const size_t words = static_cast<size_t>(shape.outputs) * ((shape.inputs + 7) / 8);
    const size_t groups = static_cast<size_t>(shape.outputs) * shape.groups;
    rows_of_values = DeviceArray<uint32_t>(words);
    rows_of_scales = DeviceArray<uint32_t>(groups);
    FillWords<<<1024, 256>>>(rows_of_values.get(), words, seed);
    FillScaleWords<<<1024, 256>>>(rows_of_scales.get(), groups, seed + 1, scale, symmetric);
    values = DeviceArray<uint4>(shape.ValueBytes() / sizeof(uint4));
    scales = DeviceArray<uint32_t>(shape.ScaleBytes() / sizeof(uint32_t));
    values.Zero();
    scales.Zero();
    // In two pieces, as a loader would.
    const int first = shape.outputs / 3;
    Pack(0, first);
    Pack(first, shape.outputs - first);
    TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
    if (keep_rows) return;
    rows_of_values = {};
    rows_of_scales = {};
  }
  void Pack(int first, int rows) const {
    TANDEM_CUDA_CHECK(PackInt4Rows(
        layout, rows_of_values.get() + static_cast<size_t>(first) * ((layout.inputs + 7) / 8),
        rows_of_scales.get() + static_cast<size_t>(first) * layout.groups, first, rows,
        values.get(), scales.get(), nullptr));
  }
  Int4Matrix matrix() const { return layout.At(values.get(), scales.get()); }
  double bytes() const { return static_cast<double>(layout.ValueBytes() + layout.ScaleBytes()); }

  Int4Layout layout;
  DeviceArray<uint32_t> rows_of_values, rows_of_scales;
  DeviceArray<uint4> values;
  DeviceArray<uint32_t> scales;
};

// The weight that the rows stand for.
__device__ inline float Int4WeightAt(const uint32_t* rows_of_values, const uint32_t* rows_of_scales,
                                     const Int4Layout& layout, int row, int k) {
  const uint32_t word =
      rows_of_values[static_cast<size_t>(row) * ((layout.inputs + 7) / 8) + k / 8];
  const uint32_t scale =
      rows_of_scales[static_cast<size_t>(row) * layout.groups + k / layout.group_size];
  const int value = static_cast<int>(word >> (4 * (k % 8)) & 15) - static_cast<int>(scale & 15);
  return __uint_as_float(scale & ~15u) * static_cast<float>(value);
}

// out[row][n] = sum_k weight[n][k] x[row][k] * inverse_rms[row], in float64.
static __global__ void ReferenceInt4(const uint32_t* rows_of_values, const uint32_t* rows_of_scales,
                                     Int4Layout layout, const __nv_bfloat16* x,
                                     const double* inverse_rms, double* out) {
  const int n = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), row = blockIdx.y;
  if (n >= layout.outputs) return;
  double sum = 0;
  for (int k = 0; k < layout.inputs; ++k) {
    sum += static_cast<double>(Int4WeightAt(rows_of_values, rows_of_scales, layout, n, k)) *
           static_cast<double>(__bfloat162float(x[static_cast<int64_t>(row) * layout.inputs + k]));
  }
  out[static_cast<int64_t>(row) * layout.outputs + n] =
      inverse_rms == nullptr ? sum : sum * inverse_rms[row];
}

}  // namespace tandem::engine::cuda
