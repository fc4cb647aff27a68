// Conversions between the element types of weights, activations and KV, one value at a time.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tandem::engine {

// Both directions exact where representable; FloatToBF16 rounds to nearest even and keeps NaN.
inline float BF16ToFloat(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t FloatToBF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE binary16.
inline float F16ToFloat(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu, mantissa = bits & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Eight bits: sign, 4 of exponent (bias 7), 3 of mantissa, as the Open Compute Project's OFP8
// (2023) has E4M3. No infinity: 0x7f and 0xff are NaN, 0x7e is the largest number, 448.
inline float E4M3ToFloat(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24, magnitude = bits & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude < 8) {  // zero or subnormal: mantissa * 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
}

// Rounds to nearest even; what is larger than 448, infinity too, becomes 448. Keeps NaN.
inline uint8_t FloatToE4M3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80u);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  const float size = std::min(std::bit_cast<float>(bits & 0x7fffffffu), 448.0f);
  const uint32_t near = std::bit_cast<uint32_t>(size);
  // Floats from 2^14 on are multiples of 2^-9, as numbers below 2^-6 are here.
  const uint32_t code = size < 0x1p-6f ? std::bit_cast<uint32_t>(size + 0x1p14f) & 0xfu
                                       : ((near + 0x7ffffu + ((near >> 20) & 1u)) >> 20) - 960u;
  return static_cast<uint8_t>(sign | code);
}

enum class Element { kFloat32, kBFloat16, kFloat16, kFloat8E4M3 };

constexpr size_t ElementSize(Element element) {
  switch (element) {
    case Element::kFloat32:
      return 4;
    case Element::kBFloat16:
    case Element::kFloat16:
      return 2;
    case Element::kFloat8E4M3:
      return 1;
  }
  return 0;
}

// Element `index` of `data`, which need not be aligned (checkpoint files align nothing).
inline float LoadElement(const void* data, Element element, size_t index) {
  const unsigned char* at = static_cast<const unsigned char*>(data) + index * ElementSize(element);
  if (element == Element::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  if (element == Element::kFloat8E4M3) return E4M3ToFloat(*at);
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return element == Element::kBFloat16 ? BF16ToFloat(bits) : F16ToFloat(bits);
}

}  // namespace tandem::engine
