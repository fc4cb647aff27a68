// The kernels of gpu_ceilings.cc.
#include <cuda_bf16.h>

#include "bench/gpu_ceilings_kernels.h"

namespace tandem::engine::cuda {
namespace {

__device__ uint32_t Mix(uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>(x >> 32);
}

__global__ void FillRandomKernel(__nv_bfloat16* data, size_t count, uint64_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const float uniform = static_cast<float>(Mix(seed + i * 0x9e3779b97f4a7c15ull)) * 0x1p-32f;
    data[i] = __float2bfloat16_rn(2.0f * uniform - 1.0f);
  }
}

// By fours. Without the highest bit of the exponent none is NaN.
__global__ void FillRandomE4M3Kernel(uint32_t* data, size_t count, uint64_t seed) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    data[i] = Mix(seed + i * 0x9e3779b97f4a7c15ull) & 0xbfbfbfbfu;
  }
}

// Sums what it reads, so that nothing is left out.
__global__ void __launch_bounds__(512) ReadKernel(const uint4* data, size_t count, uint32_t* sum) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  constexpr int kDeep = 8;
  uint32_t total = 0;
  for (; i + (kDeep - 1) * stride < count; i += kDeep * stride) {
    uint4 v[kDeep];
#pragma unroll
    for (int k = 0; k < kDeep; ++k) v[k] = __ldcs(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < kDeep; ++k) total += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += stride) total += data[i].x;
  if (total == 0x12345678u) *sum = total;
}

}  // namespace

cudaError_t LaunchFillRandom(void* data, size_t bytes, uint64_t seed) {
  FillRandomKernel<<<2048, 256>>>(static_cast<__nv_bfloat16*>(data), bytes / 2, seed);
  return cudaGetLastError();
}

cudaError_t LaunchFillRandomE4M3(void* data, size_t bytes, uint64_t seed) {
  FillRandomE4M3Kernel<<<2048, 256>>>(static_cast<uint32_t*>(data), bytes / 4, seed);
  return cudaGetLastError();
}

cudaError_t LaunchRead(const void* data, size_t bytes, int blocks, uint32_t* sum) {
  ReadKernel<<<blocks, 512>>>(static_cast<const uint4*>(data), bytes / sizeof(uint4), sum);
  return cudaGetLastError();
}

}  // namespace tandem::engine::cuda
