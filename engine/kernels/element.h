// Conversions between the element types of weights, activations and KV, one value at a time.
#pragma once

#include <bit>
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

enum class Element { kFloat32, kBFloat16, kFloat16 };

constexpr size_t ElementSize(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// Element `index` of `data`, which need not be aligned (checkpoint files align nothing).
inline float LoadElement(const void* data, Element element, size_t index) {
  const unsigned char* at = static_cast<const unsigned char*>(data) + index * ElementSize(element);
  if (element == Element::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return element == Element::kBFloat16 ? BF16ToFloat(bits) : F16ToFloat(bits);
}

}  // namespace tandem::engine
