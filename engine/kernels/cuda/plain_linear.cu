#include "engine/kernels/cuda/plain_linear.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kTile = 32;  // of rows, of columns and of k
constexpr int kLanes = 8;  // rows of threads; each computes kTile / kLanes rows of a column

__global__ __launch_bounds__(kTile* kLanes) void PlainLinearKernel(ProductShape shape, int rows,
                                                                   const __nv_bfloat16* x,
                                                                   const __nv_bfloat16* weight,
                                                                   void* y) {
  __shared__ float xs[kTile][kTile], ws[kTile][kTile + 1];
  const int tx = static_cast<int>(threadIdx.x) % kTile, ty = static_cast<int>(threadIdx.x) / kTile;
  const int first_row = static_cast<int>(blockIdx.y) * kTile;
  const int first_column = static_cast<int>(blockIdx.x) * kTile;
  float sums[kTile / kLanes] = {};
  for (int k = 0; k < shape.k; k += kTile) {
    for (int i = ty; i < kTile; i += kLanes) {
      const bool inside = k + tx < shape.k;
      const int64_t row = first_row + i, column = first_column + i;
      xs[i][tx] = inside && row < rows ? __bfloat162float(x[row * shape.k + k + tx]) : 0.0f;
      ws[i][tx] =
          inside && column < shape.n ? __bfloat162float(weight[column * shape.k + k + tx]) : 0.0f;
    }
    __syncthreads();
    for (int j = 0; j < kTile; ++j) {
#pragma unroll
      for (int i = 0; i < kTile / kLanes; ++i) sums[i] += xs[ty + i * kLanes][j] * ws[tx][j];
    }
    __syncthreads();
  }
  const int column = first_column + tx;
  for (int i = 0; i < kTile / kLanes; ++i) {
    const int row = first_row + ty + i * kLanes;
    if (row >= rows || column >= shape.n) continue;
    const int64_t at = static_cast<int64_t>(row) * shape.n + column;
    if (shape.output == ProductOutput::kBFloat16) {
      static_cast<__nv_bfloat16*>(y)[at] = __float2bfloat16_rn(sums[i]);
    } else if (shape.output == ProductOutput::kFloat32) {
      static_cast<float*>(y)[at] = sums[i];
    } else {
      static_cast<float*>(y)[at] += sums[i];
    }
  }
}

__global__ void FillNoiseKernel(__nv_bfloat16* data, size_t count, uint64_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    uint64_t z = (seed << 40) + i + 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    const auto value = static_cast<int32_t>((z ^ (z >> 31)) >> 32);
    data[i] = __float2bfloat16_rn(static_cast<float>(value) * 0x1p-31f);
  }
}

}  // namespace

cudaError_t PlainLinear(const ProductShape& shape, int rows, const __nv_bfloat16* x,
                        const __nv_bfloat16* weight, void* y, cudaStream_t stream) {
  if (rows < 1) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>((shape.n + kTile - 1) / kTile),
                  static_cast<unsigned>((rows + kTile - 1) / kTile));
  PlainLinearKernel<<<grid, kTile * kLanes, 0, stream>>>(shape, rows, x, weight, y);
  return cudaGetLastError();
}

cudaError_t FillNoise(__nv_bfloat16* data, size_t count, uint64_t seed, cudaStream_t stream) {
  FillNoiseKernel<<<1024, 256, 0, stream>>>(data, count, seed);
  return cudaGetLastError();
}

}  // namespace tandem::engine::cuda
