// Numbers of KV pages in a byte each (Element::kFloat8E4M3): from float32 as FloatToE4M3() of
// element.h makes them, and to wider types, all of which hold them exactly. sm_89 and newer have
// instructions for both, of which a build for every card uses those of sm_90 (cmake/Cuda.cmake).
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "engine/kernels/cuda/ptx.cuh"

namespace tandem::engine::cuda {

struct E4M3 {
  uint8_t bits;
};

// `low` in the lower byte. Rounds to nearest even, what is larger than 448 to that; keeps NaN.
__device__ inline uint16_t PackE4M3(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// Of two, the lower byte's in the lower half.
__device__ inline uint32_t HalvesOf(uint16_t two) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(two));
  return halves;
#else
  // The exponent's bias is 8 less than that of a half: numbers below 2^-6 included, bits that are
  // shifted to their places are a 2^-8th of the number, and 480 where that is NaN.
  const uint32_t apart = __byte_perm(two, 0, 0x1404);
  const uint32_t small = (apart & 0x80008000u) | ((apart & 0x7f007f00u) >> 1);
  const __half2 number =
      __hmul2(*reinterpret_cast<const __half2*>(&small), __float2half2_rn(256.0f));
  return *reinterpret_cast<const uint32_t*>(&number) |
         __hgt2_mask(__habs2(number), __float2half2_rn(448.0f));
#endif
}

__device__ inline float2 FloatsOf(uint16_t two) {
  const uint32_t halves = HalvesOf(two);
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

__device__ inline uint32_t BFloat16sOf(uint16_t two) {
  const float2 floats = FloatsOf(two);
  return PackBFloat16(floats.x, floats.y);
}

__device__ inline float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float ToFloat(E4M3 value) { return FloatsOf(value.bits).x; }

// to[at] = value, rounded to e4m3 or to bfloat16.
__device__ inline void StoreElement(void* to, bool fp8, int64_t at, float value) {
  if (fp8) {
    static_cast<uint8_t*>(to)[at] = static_cast<uint8_t>(PackE4M3(value, 0));
  } else {
    static_cast<__nv_bfloat16*>(to)[at] = __float2bfloat16_rn(value);
  }
}

}  // namespace tandem::engine::cuda
