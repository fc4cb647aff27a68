// E4M3 against its definition, written another way than the conversions are.
#include "engine/kernels/element.h"

#include <cmath>
#include <limits>
#include <random>

#include "gtest/gtest.h"

namespace tandem::engine {
namespace {

constexpr int kCodes = 256;

bool IsNan(int code) { return (code & 0x7f) == 0x7f; }

// (-1)^sign * 2^(exponent - 7) * 1.mantissa; an exponent of 0 stands for 1, without the 1.
double Value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double size =
      exponent == 0 ? std::ldexp(mantissa / 8.0, -6) : std::ldexp(1 + mantissa / 8.0, exponent - 7);
  return code < 128 ? size : -size;
}

// The nearest number; of two as near the one that is even. Searched for among all.
int Nearest(float x) {
  int best = 0;
  for (int code = 0; code < kCodes; ++code) {
    if (IsNan(code) || code >> 7 != (std::signbit(x) ? 1 : 0)) continue;
    const double now = std::abs(Value(code) - static_cast<double>(x));
    const double then = std::abs(Value(best) - static_cast<double>(x));
    if (best >> 7 != code >> 7 || now < then || (now == then && code % 2 == 0)) best = code;
  }
  return best;
}

TEST(E4M3Test, EveryCodeIsItsValue) {
  EXPECT_EQ(Value(0x7e), 448);
  for (int code = 0; code < kCodes; ++code) {
    const float value = E4M3ToFloat(static_cast<uint8_t>(code));
    if (IsNan(code)) {
      EXPECT_TRUE(std::isnan(value)) << code;
      continue;
    }
    EXPECT_EQ(value, Value(code)) << code;
    EXPECT_EQ(std::signbit(value), code >= 128) << code;
    EXPECT_EQ(FloatToE4M3(value), code);
  }
}

TEST(E4M3Test, HalfwayGoesToTheEvenOneAndTheRestToTheNearest) {
  for (int code = 0; code + 1 < 0x7f; ++code) {
    const auto half = static_cast<float>((Value(code) + Value(code + 1)) / 2);
    EXPECT_EQ(FloatToE4M3(half), code + code % 2) << code;
    EXPECT_EQ(FloatToE4M3(-half), 128 + code + code % 2) << code;
    EXPECT_EQ(FloatToE4M3(std::nextafter(half, 0.0f)), code) << code;
    EXPECT_EQ(FloatToE4M3(std::nextafter(half, 1000.0f)), code + 1) << code;
  }
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    // Of all sizes from 2^-15, which is nothing here, to 2^10, which is too much.
    const float size = std::exp2(std::uniform_real_distribution<float>(-15, 10)(random));
    const float x = i % 2 == 0 ? size : -size;
    ASSERT_EQ(FloatToE4M3(x), Nearest(x)) << x;
  }
}

TEST(E4M3Test, WhatIsTooLargeIsTheLargestAndNanStays) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float x : {448.0f, 449.0f, 480.0f, 1e30f, kInfinity}) {
    EXPECT_EQ(FloatToE4M3(x), 0x7e) << x;
    EXPECT_EQ(FloatToE4M3(-x), 0xfe) << x;
  }
  for (const float x : {0.0f, 1e-38f, 1e-45f}) {
    EXPECT_EQ(FloatToE4M3(x), 0) << x;
    EXPECT_EQ(FloatToE4M3(-x), 0x80) << x;
  }
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(std::isnan(E4M3ToFloat(FloatToE4M3(kNan))));
  EXPECT_TRUE(std::isnan(E4M3ToFloat(FloatToE4M3(-kNan))));
}

TEST(E4M3Test, LoadElementReadsIt) {
  const uint8_t codes[] = {0x38, 0xb8, 0x01};
  EXPECT_EQ(LoadElement(codes, Element::kFloat8E4M3, 0), 1);
  EXPECT_EQ(LoadElement(codes, Element::kFloat8E4M3, 1), -1);
  EXPECT_EQ(LoadElement(codes, Element::kFloat8E4M3, 2), 0x1p-9f);
}

}  // namespace
}  // namespace tandem::engine
