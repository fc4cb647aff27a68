#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/kernels/cpu/embedding.h"
#include "engine/kernels/cpu/log_softmax.h"
#include "engine/kernels/cpu/rms_norm.h"
#include "engine/kernels/cpu/rope.h"
#include "engine/kernels/cpu/silu_mul.h"
#include "engine/kernels/draw_weight.h"
#include "engine/kernels/rope.h"

namespace tandem::engine {
namespace {

using ::testing::ElementsAre;

std::vector<float> Ramp(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = std::sin(static_cast<float>(i) * 0.7f) * 3;
  return values;
}

TEST(RmsNormTest, MatchesFormulaAtAnyWidth) {
  Threads threads(2);
  for (const size_t width : {1, 7, 16, 33, 100}) {
    const std::vector<float> x = Ramp(3 * width), weight = Ramp(width);
    std::vector<float> out(x.size());
    RmsNorm(x.data(), weight.data(), 1e-6f, 3, width, out.data(), &threads);
    for (size_t r = 0; r < 3; ++r) {
      double squares = 0;
      for (size_t c = 0; c < width; ++c) {
        squares += std::pow(static_cast<double>(x[r * width + c]), 2);
      }
      const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + 1e-6);
      for (size_t c = 0; c < width; ++c) {
        const double want =
            static_cast<double>(x[r * width + c]) * scale * static_cast<double>(weight[c]);
        EXPECT_NEAR(out[r * width + c], want, 1e-5) << width;
      }
    }
  }
}

TEST(SiluMulTest, MatchesFormulaAndStaysFiniteAtTheEnds) {
  Threads threads(1);
  const std::vector<float> gate_up = {-200, -3, 0, 1, 200, 2, 2, 2, 2, 2};
  std::vector<float> x(5);
  SiluMul(gate_up.data(), 1, 5, x.data(), &threads);
  EXPECT_NEAR(x[0], 0, 1e-30);
  EXPECT_NEAR(x[1], 2 * -3 / (1 + std::exp(3.0)), 1e-6);
  EXPECT_EQ(x[2], 0);
  EXPECT_NEAR(x[3], 2 / (1 + std::exp(-1.0)), 1e-6);
  EXPECT_NEAR(x[4], 400, 1e-4);
}

TEST(RmsNormTest, HeadsAreNormalisedOneByOneWithinAStride) {
  Threads threads(1);
  const std::vector<float> weight = {2, 3};
  std::vector<float> x = {3, 4, 0, 5, 99, 1, 1, -2, 0, 99};  // 2 rows of 2 heads, stride 5
  RmsNormHeads(x.data(), 2, 5, 2, 2, weight.data(), 0.0f, &threads);
  const std::vector<float> want = {6 / std::sqrt(12.5f),
                                   12 / std::sqrt(12.5f),
                                   0,
                                   15 / std::sqrt(12.5f),
                                   99,
                                   2,
                                   3,
                                   -4 / std::sqrt(2.0f),
                                   0,
                                   99};
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(x[i], want[i], 1e-6) << i;
}

TEST(RopeTest, RotatesPairsByPositionTimesFrequency) {
  Threads threads(1);
  const int head_dim = 6;
  const std::vector<float> frequencies = RopeFrequencies(head_dim, 10000.0);
  EXPECT_EQ(frequencies[0], 1.0f);
  EXPECT_NEAR(frequencies[1], std::pow(10000.0, -2.0 / 6), 1e-7);
  const int32_t position = 5;
  std::vector<float> cos(3), sin(3), x = {1, 2, 3, 4, 5, 6};
  RopeTables(frequencies.data(), head_dim, 1.0f, &position, 1, cos.data(), sin.data(), &threads);
  ApplyRope(x.data(), 1, 6, 1, head_dim, cos.data(), sin.data(), &threads);
  for (int i = 0; i < 3; ++i) {
    const double angle = 5 * std::pow(10000.0, -2.0 * i / 6);
    EXPECT_NEAR(x[static_cast<size_t>(i)], (i + 1) * std::cos(angle) - (i + 4) * std::sin(angle),
                1e-5);
    EXPECT_NEAR(x[static_cast<size_t>(i) + 3],
                (i + 4) * std::cos(angle) + (i + 1) * std::sin(angle), 1e-5);
  }
}

TEST(RopeTest, YarnKeepsFastFrequenciesAndStretchesSlowOnes) {
  const RopeYarn yarn{4.0, 256, 32, 1};
  const std::vector<float> plain = RopeFrequencies(128, 1e6);
  const std::vector<float> stretched = RopeFrequenciesYarn(128, 1e6, yarn);
  EXPECT_EQ(stretched.front(), plain.front());
  EXPECT_NEAR(stretched.back() / plain.back(), 0.25, 1e-6);
  for (size_t i = 0; i < plain.size(); ++i) {
    EXPECT_LE(stretched[i], plain[i] * 1.000001f);
    EXPECT_GE(stretched[i], plain[i] * 0.249999f);
  }
  EXPECT_EQ(YarnAttentionFactor(1.0), 1.0f);
  EXPECT_NEAR(YarnAttentionFactor(4.0), 0.1 * std::log(4.0) + 1, 1e-7);
}

TEST(RopeTest, Llama3KeepsFastFrequenciesAndDividesSlowOnes) {
  const RopeLlama3 scaling{8.0, 1.0, 4.0, 8192};
  const std::vector<float> plain = RopeFrequencies(128, 5e5);
  const std::vector<float> scaled = RopeFrequenciesLlama3(128, 5e5, scaling);
  for (size_t i = 0; i < plain.size(); ++i) {
    const double turns = 8192 * plain[i] / (2 * 3.14159265358979);
    if (turns > 4.001) {
      EXPECT_EQ(scaled[i], plain[i]) << i;
    } else if (turns < 0.999) {
      EXPECT_EQ(scaled[i], plain[i] / 8) << i;
    } else {
      const double smooth = (turns - 1) / 3;
      EXPECT_NEAR(scaled[i] / plain[i], (1 - smooth) / 8 + smooth, 1e-3) << i;
    }
  }
  EXPECT_LT(scaled.back(), plain.back());
}

TEST(EmbeddingTest, GathersEveryElementType) {
  Threads threads(1);
  const std::vector<uint16_t> table = {0x3f80, 0x4000, 0x4040, 0x4080};  // bf16 1 2 3 4
  const std::vector<int32_t> ids = {1, 0, 1};
  std::vector<float> out(6);
  GatherEmbedding(table.data(), Element::kBFloat16, 2, ids.data(), 3, out.data(), &threads);
  EXPECT_THAT(out, ElementsAre(3, 4, 1, 2, 3, 4));
}

TEST(LogSoftmaxTest, MaximumFindsTheLowestOfEqualsAndNan) {
  std::vector<float> row(100, -1.0f);
  row[40] = row[70] = 5.0f;
  EXPECT_EQ(FindMaximum(row.data(), 100).index, 40u);
  EXPECT_EQ(FindMaximum(row.data(), 100).value, 5.0f);
  for (const size_t at : {0, 17, 99}) {
    std::vector<float> broken = row;
    broken[at] = std::nanf("");
    EXPECT_TRUE(FindMaximum(broken.data(), 100).has_nan) << at;
  }
}

TEST(LogSoftmaxTest, LogSumExpIsStable) {
  for (const size_t count : {1, 15, 16, 1000}) {
    std::vector<float> row = Ramp(count);
    for (float& x : row) x += 1000;
    double want = 0;
    for (const float x : row) want += std::exp(static_cast<double>(x) - 1000);
    const float maximum = FindMaximum(row.data(), count).value;
    EXPECT_NEAR(LogSumExp(row.data(), count, maximum), 1000 + std::log(want), 1e-6);
  }
}

TEST(LogSoftmaxTest, TopIndicesBreaksTiesByIndex) {
  const std::vector<float> row = {1, 3, 2, 3, 0, 2};
  EXPECT_THAT(TopIndices(row.data(), row.size(), 4), ElementsAre(1, 3, 2, 5));
  EXPECT_THAT(TopIndices(row.data(), row.size(), 1), ElementsAre(1));
  EXPECT_EQ(TopIndices(row.data(), row.size(), 99).size(), 6u);
  EXPECT_TRUE(TopIndices(row.data(), row.size(), 0).empty());
}

TEST(DrawWeightTest, IsTheProbabilityRelativeToTheMaximum) {
  EXPECT_EQ(DrawWeight(3.5f, 3.5f, DrawScale(0.7f)), kFullWeight);
  EXPECT_EQ(DrawWeight(-std::numeric_limits<float>::infinity(), 3.5f, DrawScale(1)), 0u);
  EXPECT_EQ(DrawWeight(-3e38f, 3e38f, DrawScale(1)), 0u);
  for (const float temperature : {0.1f, 0.7f, 1.0f, 3.0f}) {
    for (float logit = 0; logit > -12 * temperature; logit -= 0.01f) {
      const double got =
          static_cast<double>(DrawWeight(logit, 0, DrawScale(temperature))) * 0x1p-44;
      const double exponent = static_cast<double>(logit) / static_cast<double>(temperature);
      EXPECT_NEAR(got / std::exp(exponent), 1, 3e-7 - 2e-7 * exponent);
    }
  }
}

TEST(DrawWeightTest, NeverGrowsAsTheLogitFalls) {
  uint64_t last = kFullWeight;
  // All exponents down to where nothing is left, in steps of some floats, and all of some octaves.
  const float scale = DrawScale(1);
  for (uint32_t bits = BitsOf(-1e-9f); bits < BitsOf(-40.0f); bits += 97) {
    const uint64_t weight = DrawWeight(std::bit_cast<float>(bits), 0, scale);
    ASSERT_LE(weight, last) << bits;
    last = weight;
  }
  EXPECT_EQ(last, 0u);
}

TEST(DrawWeightTest, PartsOfASumStayInside) {
  EXPECT_EQ(LeastWeight(0), 0u);
  EXPECT_EQ(LeastWeight(1), kFullWeight);
  EXPECT_EQ(LeastWeight(0x1p-50f), 1u);
  const uint64_t large = kFullWeight << 18 | 1;
  EXPECT_EQ(NucleusWeight(large, 0), 1u);
  EXPECT_LE(NucleusWeight(large, 0.99999994f), large);
  EXPECT_EQ(DrawTarget(1, 0.9999999999999999), 0u);
  EXPECT_LT(DrawTarget(large, 0.9999999999999999), large);
}

TEST(ThreadsTest, EveryIndexOnce) {
  for (const int count : {1, 2, 5}) {
    Threads threads(count);
    EXPECT_EQ(threads.count(), count);
    for (int round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> hits(97);
      threads.ForEach(97, true, [&](size_t i, int) { ++hits[i]; });
      threads.ForRanges(97, 3, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) ++hits[i];
      });
      for (const auto& hit : hits) ASSERT_EQ(hit, 2);
    }
  }
  EXPECT_GE(PhysicalCores(), 1);
}

}  // namespace
}  // namespace tandem::engine
