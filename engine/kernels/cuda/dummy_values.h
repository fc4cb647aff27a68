// Random weights made where they are wanted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace tandem::engine::cuda {

// out[i] = DummyValue(key, first + i) (engine/kernels/dummy_value.h), rounded, for i < count: the
// bits that the CPU makes.
cudaError_t FillDummyValues(uint64_t key, uint64_t first, size_t count, __nv_bfloat16* out,
                            cudaStream_t stream);

}  // namespace tandem::engine::cuda
