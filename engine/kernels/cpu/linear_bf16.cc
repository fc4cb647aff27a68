// The bfloat16 matrix product of linear.h on AVX-512, in two ways. VDPBF16PS multiplies pairs of
// bfloat16. Where it is slow (Intel's cores issue one every second cycle, and two multiply-adds of
// float32 every cycle) weights are widened to float32 instead: twice the speed from some rows on.
// Both add the odd input of a pair before the even one, and products of bfloat16 are exact in
// float32, so their results are the same bits (but for denormal numbers, which VDPBF16PS flushes).
// Highway 1.0 does not reach VDPBF16PS, hence intrinsics, each function marked with the instruction
// sets it needs.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "engine/device/cpu/cpu_features.h"
#include "engine/kernels/cpu/linear_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TANDEM_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace tandem::engine {
namespace {

constexpr size_t kLanes = 16;    // float32 per vector
constexpr size_t kMaxRows = 12;  // 24 accumulators, 2 or 4 weight vectors, 1 broadcast, 1 mask

// Tells the processor of a stream that is read once: the hardware prefetcher stops at page ends.
constexpr size_t kPrefetchPairs = 32;

// The rows of inputs are shared by few weights if they are few: then memory is the limit.
template <size_t kRows>
TANDEM_BF16 inline void PrefetchWeights(const uint16_t* pair) {
  if constexpr (kRows <= 8) {
    _mm_prefetch(pair + kPrefetchPairs * 2 * kPanel, _MM_HINT_T0);
    _mm_prefetch(pair + kPrefetchPairs * 2 * kPanel + 2 * kLanes, _MM_HINT_T0);
  }
}

template <size_t kRows>
TANDEM_BF16 inline void StoreSums(__m512 (&sum0)[kRows], __m512 (&sum1)[kRows], const float* bias,
                                  float* y, size_t y_stride) {
  for (size_t r = 0; r < kRows; ++r) {
    if (bias != nullptr) {
      sum0[r] = _mm512_add_ps(sum0[r], _mm512_loadu_ps(bias));
      sum1[r] = _mm512_add_ps(sum1[r], _mm512_loadu_ps(bias + kLanes));
    }
    _mm512_storeu_ps(y + r * y_stride, sum0[r]);
    _mm512_storeu_ps(y + r * y_stride + kLanes, sum1[r]);
  }
}

// 16 inputs from i, rounded to bfloat16; zero beyond k.
TANDEM_BF16 inline __m256i RoundInputs(const float* x, size_t i, size_t k) {
  const size_t left = i < k ? std::min(kLanes, k - i) : 0;
  const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x + i)));
}

struct DotPairs {
  using Input = uint16_t;

  TANDEM_BF16 static void RoundRow(const float* x, size_t k, size_t padded, uint16_t* out) {
    for (size_t i = 0; i < padded; i += kLanes) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), RoundInputs(x, i, k));
    }
  }

  template <size_t kRows>
  TANDEM_BF16 static void PanelRows(const uint16_t* x, size_t x_stride, const uint16_t* panel,
                                    size_t pairs, const float* bias, float* y, size_t y_stride) {
    __m512 sum0[kRows], sum1[kRows];
    for (size_t r = 0; r < kRows; ++r) sum0[r] = sum1[r] = _mm512_setzero_ps();
    for (size_t i = 0; i < pairs; ++i, panel += 2 * kPanel) {
      PrefetchWeights<kRows>(panel);
      const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel));
      const __m512bh w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + 2 * kLanes));
      for (size_t r = 0; r < kRows; ++r) {
        int pair;
        std::memcpy(&pair, x + r * x_stride + 2 * i, sizeof(pair));
        const __m512bh value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        sum0[r] = _mm512_dpbf16_ps(sum0[r], value, w0);
        sum1[r] = _mm512_dpbf16_ps(sum1[r], value, w1);
      }
    }
    StoreSums(sum0, sum1, bias, y, y_stride);
  }
};

// Vector arithmetic of the compiler: GCC 12 warns of its own intrinsic for shifts (bug 105593).
using Words = uint32_t __attribute__((vector_size(64)));

struct Widen {
  using Input = float;  // rounded to bfloat16 all the same

  TANDEM_BF16 static void RoundRow(const float* x, size_t k, size_t padded, float* out) {
    for (size_t i = 0; i < padded; i += kLanes) {
      const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, RoundInputs(x, i, k));
      _mm512_storeu_ps(out + i, reinterpret_cast<__m512>(reinterpret_cast<Words>(wide) << 16));
    }
  }

  template <size_t kRows>
  TANDEM_BF16 static void PanelRows(const float* x, size_t x_stride, const uint16_t* panel,
                                    size_t pairs, const float* bias, float* y, size_t y_stride) {
    __m512 sum0[kRows], sum1[kRows];
    for (size_t r = 0; r < kRows; ++r) sum0[r] = sum1[r] = _mm512_setzero_ps();
    for (size_t i = 0; i < pairs; ++i, panel += 2 * kPanel) {
      PrefetchWeights<kRows>(panel);
      const Words w0 = reinterpret_cast<Words>(_mm512_loadu_si512(panel));
      const Words w1 = reinterpret_cast<Words>(_mm512_loadu_si512(panel + 2 * kLanes));
      const __m512 odd0 = reinterpret_cast<__m512>(w0 & 0xffff0000u);
      const __m512 odd1 = reinterpret_cast<__m512>(w1 & 0xffff0000u);
      for (size_t r = 0; r < kRows; ++r) {
        const __m512 value = _mm512_set1_ps(x[r * x_stride + 2 * i + 1]);
        sum0[r] = _mm512_fmadd_ps(value, odd0, sum0[r]);
        sum1[r] = _mm512_fmadd_ps(value, odd1, sum1[r]);
      }
      const __m512 even0 = reinterpret_cast<__m512>(w0 << 16);
      const __m512 even1 = reinterpret_cast<__m512>(w1 << 16);
      for (size_t r = 0; r < kRows; ++r) {
        const __m512 value = _mm512_set1_ps(x[r * x_stride + 2 * i]);
        sum0[r] = _mm512_fmadd_ps(value, even0, sum0[r]);
        sum1[r] = _mm512_fmadd_ps(value, even1, sum1[r]);
      }
    }
    StoreSums(sum0, sum1, bias, y, y_stride);
  }
};

template <class Arithmetic>
using PanelFunction = void (*)(const typename Arithmetic::Input*, size_t, const uint16_t*, size_t,
                               const float*, float*, size_t);

// Arithmetic::PanelRows<rows> for rows in [1, kMaxRows].
template <class Arithmetic>
PanelFunction<Arithmetic> PanelRowsFor(size_t rows) {
  static constexpr auto kFunctions = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::array<PanelFunction<Arithmetic>, kMaxRows>{
        Arithmetic::template PanelRows<kIndex + 1>...};
  }
  (std::make_index_sequence<kMaxRows>());
  return kFunctions[rows - 1];
}

// Inputs lie row by row, [row][padded].
template <class Arithmetic>
void RoundRows(const LinearArgs& args, size_t begin, size_t end, void* inputs) {
  const size_t k = args.w->k, padded = PaddedInputs(k);
  for (size_t r = begin; r < end; ++r) {
    Arithmetic::RoundRow(args.x + r * args.x_stride, k, padded,
                         static_cast<typename Arithmetic::Input*>(inputs) + r * padded);
  }
}

template <class Arithmetic>
void Panels(const LinearArgs& args, const void* inputs, size_t panel_begin, size_t panel_end) {
  using Input = typename Arithmetic::Input;
  const Input* x = static_cast<const Input*>(inputs);
  const uint16_t* weights = static_cast<const uint16_t*>(args.w->data);
  const size_t n = args.w->n, padded = PaddedInputs(args.w->k);
  // Rows whose inputs stay in the second-level cache while all panels pass by.
  const size_t cached = std::max<size_t>(1, (size_t{768} << 10) / (padded * sizeof(Input)));
  const size_t row_block = (cached + kMaxRows - 1) / kMaxRows * kMaxRows;
  float edge[kMaxRows * kPanel];
  float edge_bias[kPanel] = {};
  for (size_t r0 = 0; r0 < args.rows; r0 += row_block) {
    const size_t r1 = std::min(args.rows, r0 + row_block);
    for (size_t p = panel_begin; p < panel_end; ++p) {
      const size_t column = p * kPanel, columns = std::min(kPanel, n - column);
      const bool whole = columns == kPanel;
      const float* bias = args.bias != nullptr ? args.bias + column : nullptr;
      if (!whole && bias != nullptr) {
        std::memcpy(edge_bias, bias, columns * sizeof(float));
        bias = edge_bias;
      }
      for (size_t r = r0, rows = 0; r < r1; r += rows) {
        rows = NextTileRows(r1 - r, kMaxRows);
        float* y = args.y + r * args.y_stride + column;
        PanelRowsFor<Arithmetic>(rows)(x + r * padded, padded, weights + p * kPanel * padded,
                                       padded / 2, bias, whole ? y : edge,
                                       whole ? args.y_stride : kPanel);
        for (size_t i = 0; !whole && i < rows; ++i) {
          std::memcpy(y + i * args.y_stride, edge + i * kPanel, columns * sizeof(float));
        }
      }
    }
  }
}

template <class Arithmetic>
const BF16Kernel* KernelOf() {
  static constexpr BF16Kernel kKernel = {RoundRows<Arithmetic>, Panels<Arithmetic>};
  static const bool has = CpuHasBF16();
  return has ? &kKernel : nullptr;
}

}  // namespace

const BF16Kernel* DotPairsBF16Kernel() { return KernelOf<DotPairs>(); }

const BF16Kernel* WideningBF16Kernel() { return KernelOf<Widen>(); }

const BF16Kernel* FastestAvx512BF16Kernel() {
  static const bool amd = __builtin_cpu_is("amd") != 0;
  return amd ? DotPairsBF16Kernel() : WideningBF16Kernel();
}

}  // namespace tandem::engine

#else

namespace tandem::engine {

const BF16Kernel* DotPairsBF16Kernel() { return nullptr; }
const BF16Kernel* WideningBF16Kernel() { return nullptr; }
const BF16Kernel* FastestAvx512BF16Kernel() { return nullptr; }

}  // namespace tandem::engine

#endif
