#include <algorithm>

#include "engine/kernels/cuda/dummy_values.h"
#include "engine/kernels/dummy_value.h"

namespace tandem::engine::cuda {
namespace {

__global__ void FillKernel(uint64_t key, uint64_t first, size_t count, __nv_bfloat16* out) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    out[i] = __float2bfloat16_rn(DummyValue(key, first + i));
  }
}

}  // namespace

cudaError_t FillDummyValues(uint64_t key, uint64_t first, size_t count, __nv_bfloat16* out,
                            cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  constexpr size_t kThreads = 256;
  const size_t blocks = std::min<size_t>((count + kThreads - 1) / kThreads, 4096);
  FillKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(key, first, count, out);
  return cudaGetLastError();
}

}  // namespace tandem::engine::cuda
