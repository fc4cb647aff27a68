// Device memory for tests and benchmarks on a GPU, and fillings for it. Errors end the program.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <vector>

#include "engine/device/cuda/cuda_check.h"

namespace tandem::engine::cuda {

// `count` elements of device memory; freed at the end.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(size_t count) : count_(count) {
    TANDEM_CUDA_CHECK(cudaMalloc(&data_, count * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    TANDEM_CUDA_CHECK(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }

  T* get() const { return data_; }
  size_t size() const { return count_; }

  // All bytes 0xff: NaN as float32 and bfloat16, -1 as integer.
  void Poison() { TANDEM_CUDA_CHECK(cudaMemset(data_, 0xff, count_ * sizeof(T))); }
  void Zero() { TANDEM_CUDA_CHECK(cudaMemset(data_, 0, count_ * sizeof(T))); }
  std::vector<T> ToHost() const {
    std::vector<T> values(count_);
    TANDEM_CUDA_CHECK(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Uniform in [-1, 1), a function of (seed, index).
__host__ __device__ inline float RandomAt(uint64_t seed, uint64_t index) {
  uint64_t z = (seed << 40) + index + 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<float>(static_cast<int32_t>((z ^ (z >> 31)) >> 32)) * 0x1p-31f;
}

template <typename T>
__global__ void FillRandomKernel(T* data, size_t count, uint64_t seed, float scale, float offset) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    data[i] = static_cast<T>(RandomAt(seed, i) * scale + offset);
  }
}

template <typename T>
void FillRandom(T* data, size_t count, uint64_t seed, float scale = 1, float offset = 0) {
  FillRandomKernel<<<1024, 256>>>(data, count, seed, scale, offset);
  TANDEM_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
DeviceArray<T> RandomArray(size_t count, uint64_t seed, float scale = 1, float offset = 0) {
  DeviceArray<T> array(count);
  FillRandom(array.get(), count, seed, scale, offset);
  return array;
}

}  // namespace tandem::engine::cuda
