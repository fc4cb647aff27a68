// Weights of 8 bits: e4m3 (element.h), with a scale for each row:
//
//   weight[row][input] = scale[row] * value[row][input]
//
// A scale is the least power of two with which the largest of its row fits. e4m3 is as precise at
// one size as at another, so that scales between would gain nothing, and a product with a power of
// two rounds nothing: every device has the same weights, whether it multiplies by the scale before
// a sum or behind it, and bfloat16 holds them exactly.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "engine/kernels/element.h"

namespace tandem::engine {

// Of a row whose largest size is `largest`: 2^-117 at least, with which the smallest value too is a
// normal number. What is beyond all finite numbers is taken for the largest of them.
inline float Fp8Scale(float largest) {
  constexpr uint32_t kLargestFinite = 0x7f7fffffu, kLeast = 10;
  const uint32_t bits = std::min(std::bit_cast<uint32_t>(largest), kLargestFinite);
  // 448 is 2^8 * 1.75: what is more than 1.75 of its own power of two has the next one.
  const uint32_t exponent = (bits + 0x1fffffu) >> 23;
  return std::bit_cast<float>((std::max(exponent, kLeast + 8) - 8) << 23);
}

// The largest size in a row of `inputs` numbers; NaN counts as nothing.
inline float LargestSize(const void* row, Element element, size_t inputs) {
  float largest = 0;
  for (size_t i = 0; i < inputs; ++i) {
    largest = std::max(largest, std::abs(LoadElement(row, element, i)));
  }
  return largest;
}

// What is left of a weight.
inline float RoundToFp8(float weight, float scale) {
  return E4M3ToFloat(FloatToE4M3(weight / scale)) * scale;
}

}  // namespace tandem::engine
