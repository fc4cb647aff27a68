// Weights that are rounded to 8 bits when they are loaded.
#include "engine/model/fp8_weights.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "engine/kernels/fp8_rows.h"

namespace tandem::engine {
namespace {

constexpr size_t kRows = 37, kInputs = 300;

template <typename T>
TensorView ViewOf(const std::vector<T>& values, Element element) {
  return {element,
          {static_cast<int64_t>(kRows), static_cast<int64_t>(kInputs)},
          reinterpret_cast<const std::byte*>(values.data()),
          values.size() * sizeof(T)};
}

// Rows of very different sizes, one of zeros.
std::vector<float> RandomWeights() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> weights(kRows * kInputs);
  for (size_t i = 0; i < weights.size(); ++i) {
    const size_t row = i / kInputs;
    weights[i] = row == 5 ? 0 : std::ldexp(normal(random), static_cast<int>(row) - 20);
  }
  return weights;
}

class Fp8WeightsTest : public ::testing::Test {
 protected:
  std::vector<float> Rounded(const TensorView& view) {
    const TensorView rounded = RoundToFp8(view, &threads_, &memory_);
    EXPECT_EQ(rounded.element, Element::kBFloat16);
    EXPECT_EQ(rounded.shape, view.shape);
    EXPECT_EQ(rounded.bytes, kRows * kInputs * 2);
    EXPECT_EQ(rounded.file, nullptr);
    std::vector<float> out(kRows * kInputs);
    for (size_t i = 0; i < out.size(); ++i) out[i] = LoadElement(rounded.data, rounded.element, i);
    return out;
  }

  Threads threads_{2};
  MemoryBlock memory_;
};

TEST_F(Fp8WeightsTest, EachRowHasAScaleOfItsOwn) {
  const std::vector<float> weights = RandomWeights();
  const std::vector<float> rounded = Rounded(ViewOf(weights, Element::kFloat32));
  for (size_t row = 0; row < kRows; ++row) {
    const float* own = weights.data() + row * kInputs;
    const float scale = Fp8Scale(LargestSize(own, Element::kFloat32, kInputs));
    for (size_t i = 0; i < kInputs; ++i) {
      ASSERT_EQ(rounded[row * kInputs + i], RoundToFp8(own[i], scale)) << row << ", " << i;
    }
  }
}

TEST_F(Fp8WeightsTest, OfEveryTypeThatCheckpointsHave) {
  std::vector<uint16_t> halves(kRows * kInputs), brains(kRows * kInputs);
  std::vector<float> wide(kRows * kInputs), of_brains(kRows * kInputs);
  const std::vector<float> weights = RandomWeights();
  std::mt19937 random(3);
  for (size_t i = 0; i < wide.size(); ++i) {
    halves[i] = static_cast<uint16_t>(random() % 0x7c00 | (random() % 2) << 15);
    wide[i] = F16ToFloat(halves[i]);
    brains[i] = FloatToBF16(weights[i]);
    of_brains[i] = BF16ToFloat(brains[i]);
  }
  EXPECT_EQ(Rounded(ViewOf(halves, Element::kFloat16)), Rounded(ViewOf(wide, Element::kFloat32)));
  EXPECT_EQ(Rounded(ViewOf(brains, Element::kBFloat16)),
            Rounded(ViewOf(of_brains, Element::kFloat32)));
}

TEST_F(Fp8WeightsTest, WhatIsRoundedStays) {
  const std::vector<float> once = Rounded(ViewOf(RandomWeights(), Element::kFloat32));
  EXPECT_EQ(Rounded(ViewOf(once, Element::kFloat32)), once);
}

// Rounding to 4 bits alone is an error of 2.6 %; more would be of the scales.
TEST_F(Fp8WeightsTest, ALayersOutputIsAsNearAsFourBitsAllow) {
  const std::vector<float> weights = RandomWeights();
  const std::vector<float> rounded = Rounded(ViewOf(weights, Element::kFloat32));
  std::mt19937 random(4);
  std::normal_distribution<double> normal;
  double error = 0, size = 0;
  for (int input = 0; input < 20; ++input) {
    std::vector<double> x(kInputs);
    for (double& value : x) value = normal(random);
    for (size_t row = 0; row < kRows; ++row) {
      double got = 0, want = 0;
      for (size_t i = 0; i < kInputs; ++i) {
        got += static_cast<double>(rounded[row * kInputs + i]) * x[i];
        want += static_cast<double>(weights[row * kInputs + i]) * x[i];
      }
      // Rows of all sizes count alike.
      error += std::ldexp((got - want) * (got - want), -2 * static_cast<int>(row));
      size += std::ldexp(want * want, -2 * static_cast<int>(row));
    }
  }
  EXPECT_LT(std::sqrt(error / size), 0.029);
  EXPECT_GT(std::sqrt(error / size), 0.023);
}

TEST_F(Fp8WeightsTest, AreTheMatricesOfLayers) {
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.weight", "layers.7.mlp.down_proj.weight"})
    EXPECT_TRUE(IsFp8Weight(name)) << name;
  for (const char* name :
       {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias", "model.layers.0.input_layernorm.weight"}) {
    EXPECT_FALSE(IsFp8Weight(name)) << name;
  }
}

}  // namespace
}  // namespace tandem::engine
