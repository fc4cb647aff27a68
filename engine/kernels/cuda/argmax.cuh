// Order of candidates for the next token as plain integers: the larger logit wins, among equals the
// lower token; NaN beats everything, so that it is never lost.
#pragma once

#include <cstdint>

namespace tandem::engine::cuda {

__host__ __device__ inline uint64_t RankOf(float logit, int32_t token) {
#ifdef __CUDA_ARCH__
  const uint32_t bits = __float_as_uint(logit);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &logit, sizeof(bits));
#endif
  // Monotone in the value: negative numbers are flipped whole, positive ones get the top bit.
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  const uint32_t rank = logit != logit ? ~0u : ordered;
  return static_cast<uint64_t>(rank) << 32 | ~static_cast<uint32_t>(token);
}

__host__ __device__ inline bool IsNanRank(uint64_t rank) { return rank >> 32 == ~0u; }
__host__ __device__ inline int32_t TokenOfRank(uint64_t rank) {
  return static_cast<int32_t>(~static_cast<uint32_t>(rank));
}

__device__ inline uint64_t WarpBest(uint64_t rank) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, rank, lanes);
    rank = rank > other ? rank : other;
  }
  return rank;
}

}  // namespace tandem::engine::cuda
