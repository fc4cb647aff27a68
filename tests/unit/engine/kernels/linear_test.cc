#include "engine/kernels/linear.h"

#include <cmath>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "engine/kernels/cpu_features.h"

namespace tandem {
namespace {

std::vector<float> RandomFloats(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

struct Problem {
  size_t rows, n, k;
  std::vector<float> w, x, bias;  // [n][k], [rows][k], [n]

  Problem(size_t rows, size_t n, size_t k)
      : rows(rows),
        n(n),
        k(k),
        w(RandomFloats(n * k, 1)),
        x(RandomFloats(rows * k, 2)),
        bias(RandomFloats(n, 3)) {}

  // The first `count` rows from `first`, by the kernel.
  std::vector<float> Run(Element element, size_t first, size_t count, int num_threads) const {
    Threads threads(num_threads);
    std::vector<std::byte> memory(PackedBytes(element, n, k) + 64);
    std::vector<std::byte> scratch(LinearScratchBytes(element, count, k) + 64);
    void* packed = Align(memory.data());
    PackRows(w.data(), Element::kFloat32, n, k, 0, element, packed, &threads);
    std::vector<float> y(count * n, std::nanf(""));
    Linear({element, n, k, packed}, bias.data(), x.data() + first * k, k, count, y.data(), n,
           Align(scratch.data()), &threads);
    return y;
  }

  // sum |x w| beside the exact result, which bounds the error of any order of summation.
  void CheckAgainstExact(const std::vector<float>& y, Element element) const {
    const double step =
        element == Element::kFloat32 ? 0x1p-24 * static_cast<double>(k + 2) : 0x1p-7;
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < n; ++c) {
        double sum = bias[c], size = std::abs(sum);
        for (size_t i = 0; i < k; ++i) {
          const double term = static_cast<double>(x[r * k + i]) * static_cast<double>(w[c * k + i]);
          sum += term;
          size += std::abs(term);
        }
        ASSERT_NEAR(y[r * n + c], sum, step * size) << rows << " " << n << " " << k;
      }
    }
  }

 private:
  static void* Align(std::byte* p) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
  }
};

std::vector<Element> Elements() {
  std::vector<Element> elements = {Element::kFloat32};
  if (CpuHasBF16()) elements.push_back(Element::kBFloat16);
  return elements;
}

TEST(LinearTest, MatchesExactArithmeticForEveryShape) {
  for (const Element element : Elements()) {
    for (const size_t rows : {1, 2, 5, 11, 12, 13, 37}) {
      for (const size_t n : {1, 31, 32, 33, 96, 200}) {
        for (const size_t k : {1, 2, 31, 64, 129}) {
          const Problem problem(rows, n, k);
          problem.CheckAgainstExact(problem.Run(element, 0, rows, 1), element);
        }
      }
    }
  }
}

TEST(LinearTest, ARowDoesNotDependOnItsNeighboursOrTheThreads) {
  for (const Element element : Elements()) {
    if (element == Element::kBFloat16 && OneDnnComputesLargeBatches()) continue;  // see linear.h
    const Problem problem(41, 150, 333);
    const std::vector<float> all = problem.Run(element, 0, 41, 2);
    std::mt19937 random(4);
    for (int i = 0; i < 40; ++i) {
      const size_t first = random() % 41, count = 1 + random() % (41 - first);
      const std::vector<float> some =
          problem.Run(element, first, count, 1 + static_cast<int>(random() % 3));
      for (size_t j = 0; j < some.size(); ++j) ASSERT_EQ(some[j], all[first * 150 + j]);
    }
  }
}

// Where the CPU has AMX this path is the usual one; elsewhere it must give the same numbers.
TEST(LinearTest, OneDnnReadsThePackedLayout) {
  if (!CpuHasBF16()) GTEST_SKIP() << "this CPU has no bfloat16 arithmetic";
  for (const size_t n : {64, 150}) {
    for (const size_t rows : {16, 83, 340}) {
      const Problem problem(rows, n, 200);
      ForceOneDnn(true);
      const std::vector<float> y = problem.Run(Element::kBFloat16, 0, rows, 2);
      ForceOneDnn(false);
      problem.CheckAgainstExact(y, Element::kBFloat16);
    }
  }
}

TEST(ElementTest, ConversionsAreExactAndRoundToNearestEven) {
  EXPECT_EQ(FloatToBF16(1.0f), 0x3f80);
  EXPECT_EQ(FloatToBF16(1.00390625f), 0x3f80);  // half way, to even
  EXPECT_EQ(FloatToBF16(1.01171875f), 0x3f82);
  EXPECT_TRUE(std::isnan(BF16ToFloat(FloatToBF16(std::nanf("")))));
  EXPECT_EQ(F16ToFloat(0x3c00), 1.0f);
  EXPECT_EQ(F16ToFloat(0xc000), -2.0f);
  EXPECT_EQ(F16ToFloat(0x0001), 0x1p-24f);
  EXPECT_EQ(F16ToFloat(0x03ff), 1023 * 0x1p-24f);
  EXPECT_EQ(F16ToFloat(0x7bff), 65504.0f);
  EXPECT_TRUE(std::isinf(F16ToFloat(0x7c00)));
  EXPECT_TRUE(std::isnan(F16ToFloat(0x7e00)));
}

}  // namespace
}  // namespace tandem
