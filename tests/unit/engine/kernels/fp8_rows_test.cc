// Scales of rows and what is left of weights, against their definition.
#include "engine/kernels/fp8_rows.h"

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace tandem::engine {
namespace {

// The least power of two, from 2^-117 on, 448 times which is not below.
float ScaleByDefinition(float largest) {
  double scale = 0x1p-117;
  while (448 * scale < static_cast<double>(largest)) scale *= 2;
  return static_cast<float>(scale);
}

TEST(Fp8RowsTest, ScaleIsTheLeastPowerOfTwoWithWhichTheLargestFits) {
  EXPECT_EQ(Fp8Scale(448), 1);
  EXPECT_EQ(Fp8Scale(std::nextafter(448.0f, 449.0f)), 2);
  EXPECT_EQ(Fp8Scale(224), 0.5f);
  EXPECT_EQ(Fp8Scale(1), 0x1p-8f);
  EXPECT_EQ(Fp8Scale(0), 0x1p-117f);
  for (const float tiny : {1e-45f, 1e-38f, 0x1p-110f}) EXPECT_EQ(Fp8Scale(tiny), 0x1p-117f);
  constexpr float kMost = std::numeric_limits<float>::max();
  EXPECT_EQ(Fp8Scale(kMost), 0x1p120f);
  EXPECT_EQ(Fp8Scale(std::numeric_limits<float>::infinity()), 0x1p120f);
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    const float largest = std::exp2(std::uniform_real_distribution<float>(-126, 127)(random));
    ASSERT_EQ(Fp8Scale(largest), ScaleByDefinition(largest)) << largest;
  }
}

TEST(Fp8RowsTest, LargestSizeIsOfEitherSignAndNeverNan) {
  const std::vector<float> row = {1, -3, std::numeric_limits<float>::quiet_NaN(), 2};
  EXPECT_EQ(LargestSize(row.data(), Element::kFloat32, 4), 3);
  EXPECT_EQ(LargestSize(row.data(), Element::kFloat32, 1), 1);
  EXPECT_EQ(LargestSize(row.data(), Element::kFloat32, 0), 0);
}

// Every value, under every size of scale, is left as it is, fits a bfloat16, and ties between
// neighbours go to the even one.
TEST(Fp8RowsTest, ValuesStayAndTiesGoToTheEvenOne) {
  for (const float scale : {0x1p-117f, 0x1p-20f, 1.0f, 0x1p90f}) {
    for (int code = 0; code < 256; ++code) {
      const float value = E4M3ToFloat(static_cast<uint8_t>(code)) * scale;
      if (std::isnan(value)) continue;
      EXPECT_EQ(RoundToFp8(value, scale), value);
      EXPECT_EQ(BF16ToFloat(FloatToBF16(value)), value);
      if ((code & 0x7f) >= 0x7e) continue;
      const float next = E4M3ToFloat(static_cast<uint8_t>(code + 1)) * scale;
      EXPECT_EQ(RoundToFp8((value + next) / 2, scale), code % 2 == 0 ? value : next) << code;
    }
    EXPECT_EQ(RoundToFp8(1000 * scale, scale), 448 * scale);
    EXPECT_EQ(RoundToFp8(-1000 * scale, scale), -448 * scale);
  }
  EXPECT_EQ(RoundToFp8(0, Fp8Scale(0)), 0);
  EXPECT_TRUE(std::isnan(RoundToFp8(std::numeric_limits<float>::quiet_NaN(), 1)));
}

// With its own scale no weight is cut, and one that is no more than 14,336 times smaller than the
// largest keeps four bits.
TEST(Fp8RowsTest, ARowKeepsFourBitsOfItsWeights) {
  std::mt19937 random(2);
  for (int i = 0; i < 20000; ++i) {
    const float largest = std::exp2(std::uniform_real_distribution<float>(-20, 20)(random));
    const float scale = Fp8Scale(largest);
    EXPECT_LE(std::abs(RoundToFp8(largest, scale) - largest), largest / 16);
    const float weight =
        largest * std::exp2(std::uniform_real_distribution<float>(-13.8f, 0)(random));
    ASSERT_LE(std::abs(RoundToFp8(-weight, scale) + weight), weight / 16) << weight << scale;
  }
}

}  // namespace
}  // namespace tandem::engine
