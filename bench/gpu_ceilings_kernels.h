// Kernels of gpu_ceilings.cc, on the default stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

namespace tandem::engine::cuda {

cudaError_t LaunchFillRandom(void* data, size_t bytes, uint64_t seed);
cudaError_t LaunchFillRandomE4M3(void* data, size_t bytes, uint64_t seed);
// Reads all bytes (a multiple of 16) once.
cudaError_t LaunchRead(const void* data, size_t bytes, int blocks, uint32_t* sum);

}  // namespace tandem::engine::cuda
