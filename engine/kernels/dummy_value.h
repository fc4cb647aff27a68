// The random weights of --load-format=dummy, on any device: value i of a tensor is a function of
// the tensor's key and i, so that all devices and all workers make up the same model.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TANDEM_HOST_DEVICE __host__ __device__
#else
#define TANDEM_HOST_DEVICE
#endif

namespace tandem::engine {

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a counter-based stream.
TANDEM_HOST_DEVICE constexpr uint64_t DummyMix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Uniform with mean 0 and standard deviation 0.02; to be rounded to bfloat16. Everything before the
// last product is exact, so every device gives the same bits.
TANDEM_HOST_DEVICE constexpr float DummyValue(uint64_t key, uint64_t index) {
  constexpr float kHalfWidth = 0.0346410162f;  // 0.02 * sqrt(3)
  const float unit = static_cast<float>(DummyMix(key + index) >> 40) * 0x1p-23f - 1.0f;
  return unit * kHalfWidth;
}

}  // namespace tandem::engine
