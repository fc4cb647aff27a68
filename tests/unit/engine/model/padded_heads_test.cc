#include "engine/model/padded_heads.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace tandem::engine {
namespace {

constexpr int kGroups = 4, kHeads = 7, kPadded = 8, kDim = 4, kHidden = 24, kTokens = 6;
constexpr HeadPadding kPadding{kGroups, kHeads, kPadded, kDim};

using Matrix = std::vector<std::vector<float>>;  // [rows][columns]

Matrix Random(size_t rows, size_t columns, std::mt19937* random) {
  std::normal_distribution<float> normal;
  Matrix m(rows, std::vector<float>(columns));
  for (auto& row : m) {
    for (float& value : row) value = normal(*random);
  }
  return m;
}

Matrix Padded(const Matrix& m, size_t dimension) {
  std::vector<float> flat;
  for (const auto& row : m) flat.insert(flat.end(), row.begin(), row.end());
  const TensorView view{Element::kFloat32,
                        {std::ssize(m), std::ssize(m[0])},
                        reinterpret_cast<const std::byte*>(flat.data()),
                        flat.size() * sizeof(float)};
  MemoryBlock memory;
  const TensorView padded = PadHeads(view, dimension, kPadding, &memory);
  const auto* values = reinterpret_cast<const float*>(padded.data);
  Matrix out;
  for (int64_t row = 0; row < padded.shape[0]; ++row) {
    out.emplace_back(values + row * padded.shape[1], values + (row + 1) * padded.shape[1]);
  }
  return out;
}

// An attention layer without positions; query head h reads KV head h / (heads / groups).
struct Layer {
  Matrix q, k, v, o;

  std::vector<float> Output(const Matrix& x) const {
    const size_t heads = q.size() / kDim, group = heads / kGroups;
    std::vector<float> out(kHidden, 0);
    for (size_t h = 0; h < heads; ++h) {
      const size_t kv = h / group;
      std::vector<double> weights(kTokens);
      double sum = 0;
      for (size_t t = 0; t < kTokens; ++t) {
        double score = 0;
        for (size_t d = 0; d < kDim; ++d) {
          score += Dot(q[h * kDim + d], x.back()) * Dot(k[kv * kDim + d], x[t]);
        }
        sum += weights[t] = std::exp(score / std::sqrt(kDim) / 20);
      }
      for (size_t d = 0; d < kDim; ++d) {
        double attended = 0;
        for (size_t t = 0; t < kTokens; ++t)
          attended += weights[t] / sum * Dot(v[kv * kDim + d], x[t]);
        for (size_t i = 0; i < kHidden; ++i) {
          out[i] += static_cast<float>(attended * o[i][h * kDim + d]);
        }
      }
    }
    return out;
  }
  static double Dot(const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * b[i];
    return sum;
  }
};

double RelativeL2(const std::vector<float>& got, const std::vector<float>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += std::pow(double{got[i]} - want[i], 2);
    norm += std::pow(double{want[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

TEST(HeadPaddingTest, IsUpToTheNextPowerOfTwo) {
  ModelConfig config;
  config.num_kv_heads = 4;
  config.head_dim = 128;
  for (const auto& [heads, padded] : {std::pair{28, 8}, {32, 8}, {4, 1}, {20, 8}, {12, 4}}) {
    config.num_heads = heads;
    const HeadPadding padding = HeadPadding::Of(config);
    EXPECT_EQ(padding.padded, padded) << heads;
    EXPECT_EQ(padding.adds_heads(), heads != 4 * padded);
  }
}

TEST(HeadPaddingTest, KnowsTheTensorsThatCountQueryHeads) {
  EXPECT_EQ(QueryHeadDimension("model.layers.0.self_attn.q_proj.weight"), 0u);
  EXPECT_EQ(QueryHeadDimension("model.layers.0.self_attn.q_proj.bias"), 0u);
  EXPECT_EQ(QueryHeadDimension("model.layers.0.self_attn.o_proj.weight"), 1u);
  for (const char* other : {"self_attn.o_proj.bias", "self_attn.k_proj.weight",
                            "self_attn.q_norm.weight", "mlp.up_proj.weight"}) {
    EXPECT_EQ(QueryHeadDimension(other), std::nullopt) << other;
  }
}

// And what circulates instead is not exact: copies of the first heads behind all of them.
TEST(HeadPaddingTest, ZerosInEachGroupChangeNothingAndCopiesAtTheEndDo) {
  std::mt19937 random(5);
  const size_t kv = kGroups * kDim, q = kv * kHeads;
  const Layer layer{Random(q, kHidden, &random), Random(kv, kHidden, &random),
                    Random(kv, kHidden, &random), Random(kHidden, q, &random)};
  const Matrix x = Random(kTokens, kHidden, &random);
  const std::vector<float> want = layer.Output(x);

  Layer padded = layer;
  padded.q = Padded(layer.q, 0);
  padded.o = Padded(layer.o, 1);
  ASSERT_EQ(padded.q.size(), kv * kPadded);
  EXPECT_LT(RelativeL2(padded.Output(x), want), 1e-6);

  Layer copied = layer;
  for (size_t i = 0; i < kv * (kPadded - kHeads); ++i) {
    copied.q.push_back(layer.q[i]);
    for (size_t row = 0; row < kHidden; ++row) copied.o[row].push_back(layer.o[row][i]);
  }
  const double error = RelativeL2(copied.Output(x), want);
  EXPECT_GT(error, 0.5);
  RecordProperty("copied_heads_relative_l2", std::to_string(error));
}

}  // namespace
}  // namespace tandem::engine
