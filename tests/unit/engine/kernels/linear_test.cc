#include "engine/kernels/cpu/linear.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "common/base/cpu_features.h"
#include "engine/kernels/cpu/linear_internal.h"

namespace tandem::engine {
namespace {

std::vector<float> RandomFloats(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

// One implementation of the product; `bf16` null: the float32 one.
struct Kernel {
  std::string name;
  const BF16Kernel* bf16 = nullptr;

  Element element() const { return bf16 == nullptr ? Element::kFloat32 : Element::kBFloat16; }
};

// All that this CPU can run, also those that Linear would not choose on it.
std::vector<Kernel> Kernels() {
  std::vector<Kernel> kernels = {{"float32"}};
  if (DotPairsBF16Kernel() != nullptr) kernels.push_back({"dot pairs", DotPairsBF16Kernel()});
  if (WideningBF16Kernel() != nullptr) kernels.push_back({"widening", WideningBF16Kernel()});
  if (AmxBF16Kernel() != nullptr) kernels.push_back({"amx", AmxBF16Kernel()});
  return kernels;
}

constexpr float kUntouched = -77.0f;

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

  // The first `count` rows from `first`. Checks that nothing around them is written.
  std::vector<float> Run(const Kernel& kernel, size_t first, size_t count, int num_threads,
                         bool with_bias = true) const {
    Threads threads(num_threads);
    const Element element = kernel.element();
    std::vector<std::byte> memory(PackedBytes(element, n, k) + 64);
    std::vector<std::byte> scratch(LinearScratchBytes(element, count, k) + 64, std::byte{0xff});
    void* packed = Align(memory.data());
    PackRows(w.data(), Element::kFloat32, n, k, 0, element, packed, &threads);
    const PackedMatrix matrix{element, n, k, packed};
    const size_t stride = n + 3;
    std::vector<float> y((count + 1) * stride, kUntouched);
    const LinearArgs args{
        &matrix, with_bias ? bias.data() : nullptr, x.data() + first * k, k, count, y.data(),
        stride};
    if (kernel.bf16 != nullptr) {
      LinearBF16(*kernel.bf16, args, Align(scratch.data()), &threads);
    } else {
      Linear(matrix, args.bias, args.x, k, count, y.data(), stride, nullptr, &threads);
    }
    std::vector<float> out;
    for (size_t r = 0; r < count; ++r) {
      const auto row = y.begin() + static_cast<ptrdiff_t>(r * stride);
      out.insert(out.end(), row, row + static_cast<ptrdiff_t>(n));
    }
    CheckGaps(y, stride);
    return out;
  }

  // sum |x w| beside the exact result, which bounds the error of any order of summation.
  void CheckAgainstExact(const std::vector<float>& y, Element element,
                         bool with_bias = true) const {
    const double step =
        element == Element::kFloat32 ? 0x1p-24 * static_cast<double>(k + 2) : 0x1p-7;
    for (size_t r = 0; r < rows; ++r) {
      for (size_t c = 0; c < n; ++c) {
        double sum = with_bias ? bias[c] : 0, size = std::abs(sum);
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
  void CheckGaps(const std::vector<float>& y, size_t stride) const {
    for (size_t i = 0; i < y.size(); ++i) {
      if (i % stride >= n || i / stride + 1 == y.size() / stride) {
        ASSERT_EQ(y[i], kUntouched) << "row " << i / stride << " column " << i % stride;
      }
    }
  }

  static void* Align(std::byte* p) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
  }
};

TEST(LinearTest, MatchesExactArithmeticForEveryNumberOfRows) {
  for (const Kernel& kernel : Kernels()) {
    SCOPED_TRACE(kernel.name);
    for (size_t rows = 1; rows <= 70; ++rows) {
      const Problem problem(rows, 50, 67);
      problem.CheckAgainstExact(problem.Run(kernel, 0, rows, 1), kernel.element());
    }
  }
}

TEST(LinearTest, MatchesExactArithmeticForRaggedColumnsAndInputs) {
  for (const Kernel& kernel : Kernels()) {
    SCOPED_TRACE(kernel.name);
    for (const size_t rows : {1, 12, 13, 16, 33}) {
      for (const size_t n : {1, 15, 16, 17, 31, 32, 33, 96, 200}) {
        for (const size_t k : {1, 2, 31, 32, 33, 64, 129}) {
          const Problem problem(rows, n, k);
          problem.CheckAgainstExact(problem.Run(kernel, 0, rows, 1), kernel.element());
        }
      }
    }
  }
}

// More rows and inputs than a kernel keeps in the caches at a time.
TEST(LinearTest, MatchesExactArithmeticAcrossCacheBlocks) {
  for (const Kernel& kernel : Kernels()) {
    SCOPED_TRACE(kernel.name);
    for (const bool with_bias : {false, true}) {
      const Problem problem(530, 40, 2100);
      problem.CheckAgainstExact(problem.Run(kernel, 0, 530, 2, with_bias), kernel.element(),
                                with_bias);
    }
  }
}

TEST(LinearTest, ARowDoesNotDependOnItsNeighboursOrTheThreads) {
  for (const Kernel& kernel : Kernels()) {
    SCOPED_TRACE(kernel.name);
    const Problem problem(70, 150, 333);
    const std::vector<float> all = problem.Run(kernel, 0, 70, 2);
    std::mt19937 random(4);
    for (size_t count = 1; count <= 70; ++count) {
      const size_t first = random() % (71 - count);
      const std::vector<float> some =
          problem.Run(kernel, first, count, 1 + static_cast<int>(random() % 3));
      for (size_t j = 0; j < some.size(); ++j) ASSERT_EQ(some[j], all[first * 150 + j]) << count;
    }
  }
}

// So the choice between the two, which depends on the CPU's maker, changes no result.
TEST(LinearTest, WideningAndDotPairsGiveTheSameBits) {
  if (DotPairsBF16Kernel() == nullptr) GTEST_SKIP() << "this CPU has no bfloat16 arithmetic";
  for (size_t rows = 1; rows <= 13; ++rows) {
    const Problem problem(rows, 77, 333);
    const std::vector<float> dot = problem.Run({"dot pairs", DotPairsBF16Kernel()}, 0, rows, 1);
    const std::vector<float> wide = problem.Run({"widening", WideningBF16Kernel()}, 0, rows, 1);
    for (size_t i = 0; i < dot.size(); ++i) ASSERT_EQ(dot[i], wide[i]) << rows << " " << i;
  }
}

TEST(LinearTest, ARowDoesNotDependOnCacheBlocks) {
  for (const Kernel& kernel : Kernels()) {
    SCOPED_TRACE(kernel.name);
    const Problem problem(600, 33, 2100);
    const std::vector<float> all = problem.Run(kernel, 0, 600, 2);
    for (const size_t row : {0, 511, 512, 599}) {
      const std::vector<float> alone = problem.Run(kernel, row, 1, 1);
      for (size_t c = 0; c < 33; ++c) ASSERT_EQ(alone[c], all[row * 33 + c]) << row;
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
}  // namespace tandem::engine
