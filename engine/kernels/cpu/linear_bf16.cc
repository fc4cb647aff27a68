// The bfloat16 matrix product of linear.h on AVX512-BF16. Highway 1.0 does not reach VDPBF16PS,
// hence intrinsics, each function marked with the instruction sets it needs.
#include <algorithm>
#include <cstring>

#include "engine/kernels/cpu/linear_internal.h"
#include "engine/kernels/cpu_features.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TANDEM_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace tandem::engine {
namespace {

constexpr size_t kLanes = 16;    // float32 per vector
constexpr size_t kMaxRows = 12;  // 24 accumulators, 2 weight vectors, 1 broadcast

TANDEM_BF16 inline __m512bh LoadPairs(const uint16_t* at) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(at));
}

// Tells the processor of a stream that is read once: the hardware prefetcher stops at page ends.
constexpr size_t kPrefetchPairs = 32;

template <size_t kRows>
TANDEM_BF16 void PanelRows(const uint16_t* x, size_t x_stride, const uint16_t* panel, size_t pairs,
                           const float* bias, float* y, size_t y_stride) {
  __m512 sum0[kRows], sum1[kRows];
  for (size_t r = 0; r < kRows; ++r) sum0[r] = sum1[r] = _mm512_setzero_ps();
  for (size_t i = 0; i < pairs; ++i) {
    const __m512bh w0 = LoadPairs(panel + i * 2 * kPanel);
    const __m512bh w1 = LoadPairs(panel + i * 2 * kPanel + 2 * kLanes);
    if constexpr (kRows <= 8) {
      _mm_prefetch(panel + (i + kPrefetchPairs) * 2 * kPanel, _MM_HINT_T0);
      _mm_prefetch(panel + (i + kPrefetchPairs) * 2 * kPanel + 2 * kLanes, _MM_HINT_T0);
    }
    for (size_t r = 0; r < kRows; ++r) {
      int pair;
      std::memcpy(&pair, x + r * x_stride + 2 * i, sizeof(pair));
      const __m512bh value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
      sum0[r] = _mm512_dpbf16_ps(sum0[r], value, w0);
      sum1[r] = _mm512_dpbf16_ps(sum1[r], value, w1);
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    if (bias != nullptr) {
      sum0[r] = _mm512_add_ps(sum0[r], _mm512_loadu_ps(bias));
      sum1[r] = _mm512_add_ps(sum1[r], _mm512_loadu_ps(bias + kLanes));
    }
    _mm512_storeu_ps(y + r * y_stride, sum0[r]);
    _mm512_storeu_ps(y + r * y_stride + kLanes, sum1[r]);
  }
}

using PanelFunction = void (*)(const uint16_t*, size_t, const uint16_t*, size_t, const float*,
                               float*, size_t);
constexpr PanelFunction kPanelRows[kMaxRows] = {
    PanelRows<1>, PanelRows<2>, PanelRows<3>, PanelRows<4>,  PanelRows<5>,  PanelRows<6>,
    PanelRows<7>, PanelRows<8>, PanelRows<9>, PanelRows<10>, PanelRows<11>, PanelRows<12>,
};

TANDEM_BF16 void RoundRow(const float* x, size_t k, size_t padded, uint16_t* out) {
  for (size_t i = 0; i < padded; i += kLanes) {
    const size_t left = i < k ? std::min(kLanes, k - i) : 0;
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), reinterpret_cast<__m256i>(rounded));
  }
}

// inputs: [row][padded].
void RoundRows(const LinearArgs& args, size_t begin, size_t end, uint16_t* inputs) {
  const size_t k = args.w->k, padded = PaddedInputs(k);
  for (size_t r = begin; r < end; ++r) {
    RoundRow(args.x + r * args.x_stride, k, padded, inputs + r * padded);
  }
}

void Panels(const LinearArgs& args, const uint16_t* inputs, size_t panel_begin, size_t panel_end) {
  const uint16_t* weights = static_cast<const uint16_t*>(args.w->data);
  const size_t n = args.w->n, padded = PaddedInputs(args.w->k);
  // Rows whose inputs stay in the second-level cache while all panels pass by.
  const size_t cached = std::max<size_t>(1, (size_t{768} << 10) / (padded * sizeof(uint16_t)));
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
        kPanelRows[rows - 1](inputs + r * padded, padded, weights + p * kPanel * padded, padded / 2,
                             bias, whole ? y : edge, whole ? args.y_stride : kPanel);
        for (size_t i = 0; !whole && i < rows; ++i) {
          std::memcpy(y + i * args.y_stride, edge + i * kPanel, columns * sizeof(float));
        }
      }
    }
  }
}

}  // namespace

const BF16Kernel* Avx512BF16Kernel() {
  static constexpr BF16Kernel kKernel = {RoundRows, Panels};
  static const bool has = CpuHasBF16();
  return has ? &kKernel : nullptr;
}

}  // namespace tandem::engine

#else

namespace tandem::engine {

const BF16Kernel* Avx512BF16Kernel() { return nullptr; }

}  // namespace tandem::engine

#endif
