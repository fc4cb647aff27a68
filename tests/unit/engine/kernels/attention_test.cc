#include "engine/kernels/cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace tandem::engine {
namespace {

// One sequence's queries, keys and values: [position][heads or kv_heads][head_dim].
struct Sequence {
  std::vector<float> q, k, v;
};

Sequence RandomSequence(int length, int heads, int kv_heads, int head_dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Sequence s;
  s.q.resize(static_cast<size_t>(length * heads * head_dim));
  s.k.resize(static_cast<size_t>(length * kv_heads * head_dim));
  s.v.resize(s.k.size());
  for (auto* values : {&s.q, &s.k, &s.v}) {
    for (float& x : *values) x = normal(random);
  }
  return s;
}

// softmax(q k^T / sqrt(head_dim)) v in float64, for the query at `position`.
std::vector<double> Exact(const Sequence& s, int position, int head, int heads, int kv_heads,
                          int head_dim) {
  const int kv_head = head / (heads / kv_heads);
  std::vector<double> weights;
  for (int j = 0; j <= position; ++j) {
    double dot = 0;
    for (int d = 0; d < head_dim; ++d) {
      dot +=
          static_cast<double>(s.q[static_cast<size_t>((position * heads + head) * head_dim + d)]) *
          static_cast<double>(s.k[static_cast<size_t>((j * kv_heads + kv_head) * head_dim + d)]);
    }
    weights.push_back(std::exp(dot / std::sqrt(head_dim)));
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<double> out(static_cast<size_t>(head_dim));
  for (int j = 0; j <= position; ++j) {
    for (int d = 0; d < head_dim; ++d) {
      out[static_cast<size_t>(d)] +=
          weights[static_cast<size_t>(j)] / total *
          static_cast<double>(s.v[static_cast<size_t>((j * kv_heads + kv_head) * head_dim + d)]);
    }
  }
  return out;
}

// Keys and values as pages of `element` hold them.
Sequence Stored(Sequence s, Element element) {
  for (auto* values : {&s.k, &s.v}) {
    for (float& x : *values) {
      if (element == Element::kBFloat16) x = BF16ToFloat(FloatToBF16(x));
      if (element == Element::kFloat8E4M3) x = E4M3ToFloat(FloatToE4M3(x));
    }
  }
  return s;
}

void CheckShape(int heads, int kv_heads, int head_dim, int block_size, Element element) {
  const int length = 70;
  // What rounding costs, and what the order of sums does.
  const double rounding = element == Element::kFloat32    ? 0
                          : element == Element::kBFloat16 ? 3e-2
                                                          : 0.4;
  constexpr double kTolerance = 1e-5;
  const Sequence s = RandomSequence(length, heads, kv_heads, head_dim, 7);
  const Sequence stored = Stored(s, element);
  KvPages pages{nullptr, element, kv_heads, head_dim, block_size};
  const int blocks = (length + block_size - 1) / block_size;
  // Memory that nobody wrote holds NaN.
  std::vector<uint16_t> pool(
      static_cast<size_t>(blocks) * 2 * static_cast<size_t>(kv_heads) * pages.PageBytes() / 2,
      0xffff);
  pages.base = reinterpret_cast<std::byte*>(pool.data());
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  std::iota(table.rbegin(), table.rend(), 0);
  const size_t q_width = static_cast<size_t>(heads * head_dim);
  const size_t kv_width = static_cast<size_t>(kv_heads * head_dim);
  std::vector<float> out(s.q.size());
  Threads threads(2);
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int start = 0; start < length;) {
    const int count = std::min(start == 0 ? 23 : 9, length - start);
    const AttentionItem item{0, count, start, table.data()};
    const size_t first = static_cast<size_t>(start);
    WriteKv(pages, &item, 1, s.k.data() + first * kv_width, s.v.data() + first * kv_width, kv_width,
            &threads);
    PagedAttention(pages, &item, 1, s.q.data() + first * q_width, q_width, heads, scale,
                   out.data() + first * q_width, q_width, &threads);
    start += count;
  }
  for (int p = 0; p < length; ++p) {
    for (int h = 0; h < heads; ++h) {
      const std::vector<double> want = Exact(s, p, h, heads, kv_heads, head_dim);
      const std::vector<double> of_stored = Exact(stored, p, h, heads, kv_heads, head_dim);
      for (int d = 0; d < head_dim; ++d) {
        const float got = out[static_cast<size_t>((p * heads + h) * head_dim + d)];
        ASSERT_NEAR(got, of_stored[static_cast<size_t>(d)], kTolerance)
            << "position " << p << " head " << h << " element " << d;
        ASSERT_NEAR(got, want[static_cast<size_t>(d)], rounding + kTolerance)
            << "position " << p << " head " << h << " element " << d;
      }
    }
  }
}

TEST(AttentionTest, MatchesExactArithmetic) {
  for (const Element element : {Element::kFloat32, Element::kBFloat16, Element::kFloat8E4M3}) {
    for (const int block_size : {16, 32, 256}) {
      CheckShape(7, 1, 64, block_size, element);
      CheckShape(4, 4, 64, block_size, element);
      CheckShape(6, 2, 128, block_size, element);
      CheckShape(3, 1, 6, block_size, element);  // not a whole vector
      CheckShape(2, 1, 40, block_size, element);
      CheckShape(80, 1, 16, block_size, element);  // more heads than a unit has rows
    }
  }
}

}  // namespace
}  // namespace tandem::engine
