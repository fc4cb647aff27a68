// The bfloat16 matrix product of linear.h on AVX-512, in two ways. VDPBF16PS multiplies pairs of
// bfloat16. Where it is slow (Intel's cores issue one every second cycle, and two multiply-adds of
// float32 every cycle) weights are widened to float32 instead: twice the speed from some rows on.
// Both add the odd input of a pair before the even one, and products of bfloat16 are exact in
// float32, so their results are the same bits (but for denormal numbers, which VDPBF16PS flushes).
// Highway 1.0 does not reach VDPBF16PS, hence intrinsics, each function marked with the instruction
// sets it needs.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <utility>

#include "common/base/cpu_features.h"
#include "engine/kernels/cpu/linear_internal.h"

#if defined(__x86_64__)

#include <immintrin.h>

#define TANDEM_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace tandem::engine {
namespace {

constexpr size_t kLanes = 16;    // float32 per vector
constexpr size_t kMaxRows = 12;  // 24 accumulators, 2 or 4 weight vectors, 1 broadcast, 1 mask

// A tile of the result: some rows of one panel.
template <class Input>
struct Tile {
  const Input* x = nullptr;  // of the first row
  size_t x_stride = 0;
  const uint16_t* panel = nullptr;
  size_t pairs = 0;  // of inputs
  WeightsAhead ahead;
  const float* bias = nullptr;  // may stay null
  float* y = nullptr;
  size_t y_stride = 0;
};

template <size_t kRows>
struct Sums {
  __m512 low[kRows], high[kRows];  // columns [0, 16) and [16, 32)
};

// What is done for each row is written with a pack of constants and not as a loop: GCC keeps an
// array that a loop indexes in memory, and then stores all sums once per pair of inputs.
template <size_t kRows>
using Rows = std::make_index_sequence<kRows>;

template <class Input, size_t... kRow>
TANDEM_BF16 inline void StoreSums(const Tile<Input>& tile, Sums<sizeof...(kRow)> sums,
                                  std::index_sequence<kRow...>) {
  if (tile.bias != nullptr) {
    const __m512 low = _mm512_loadu_ps(tile.bias), high = _mm512_loadu_ps(tile.bias + kLanes);
    ((sums.low[kRow] = _mm512_add_ps(sums.low[kRow], low)), ...);
    ((sums.high[kRow] = _mm512_add_ps(sums.high[kRow], high)), ...);
  }
  (_mm512_storeu_ps(tile.y + kRow * tile.y_stride, sums.low[kRow]), ...);
  (_mm512_storeu_ps(tile.y + kRow * tile.y_stride + kLanes, sums.high[kRow]), ...);
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
  TANDEM_BF16 static void Compute(const Tile<uint16_t>& tile) {
    Sums<kRows> sums = {};
    const uint16_t* w = tile.panel;
    WeightsAhead ahead = tile.ahead;
    for (size_t i = 0; i < tile.pairs; ++i, w += 2 * kPanel) {
      ahead.Prefetch();
      AddPair(tile, i, reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)),
              reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 2 * kLanes)), &sums, Rows<kRows>());
    }
    StoreSums(tile, sums, Rows<kRows>());
  }

 private:
  static TANDEM_BF16 __m512bh Pair(const Tile<uint16_t>& tile, size_t row, size_t i) {
    int pair;
    std::memcpy(&pair, tile.x + row * tile.x_stride + 2 * i, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }

  template <size_t... kRow>
  TANDEM_BF16 static inline void AddPair(const Tile<uint16_t>& tile, size_t i, __m512bh low,
                                         __m512bh high, Sums<sizeof...(kRow)>* sums,
                                         std::index_sequence<kRow...>) {
    (AddPairOfRow(Pair(tile, kRow, i), low, high, &sums->low[kRow], &sums->high[kRow]), ...);
  }
  TANDEM_BF16 static inline void AddPairOfRow(__m512bh value, __m512bh low, __m512bh high,
                                              __m512* low_sum, __m512* high_sum) {
    *low_sum = _mm512_dpbf16_ps(*low_sum, value, low);
    *high_sum = _mm512_dpbf16_ps(*high_sum, value, high);
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
  TANDEM_BF16 static void Compute(const Tile<float>& tile) {
    Sums<kRows> sums = {};
    const uint16_t* w = tile.panel;
    WeightsAhead ahead = tile.ahead;
    for (size_t i = 0; i < tile.pairs; ++i, w += 2 * kPanel) {
      ahead.Prefetch();
      const Words low = reinterpret_cast<Words>(_mm512_loadu_si512(w));
      const Words high = reinterpret_cast<Words>(_mm512_loadu_si512(w + 2 * kLanes));
      AddInput<kRows>(tile, 2 * i + 1, low & 0xffff0000u, high & 0xffff0000u, &sums);
      AddInput<kRows>(tile, 2 * i, low << 16, high << 16, &sums);
    }
    StoreSums(tile, sums, Rows<kRows>());
  }

 private:
  // low, high: the bits of the widened weights of input i.
  template <size_t kRows>
  TANDEM_BF16 static inline void AddInput(const Tile<float>& tile, size_t i, Words low, Words high,
                                          Sums<kRows>* sums) {
    const __m512 w0 = reinterpret_cast<__m512>(low), w1 = reinterpret_cast<__m512>(high);
    for (size_t r = 0; r < kRows; ++r) {
      const __m512 value = _mm512_set1_ps(tile.x[r * tile.x_stride + i]);
      sums->low[r] = _mm512_fmadd_ps(value, w0, sums->low[r]);
      sums->high[r] = _mm512_fmadd_ps(value, w1, sums->high[r]);
    }
  }
};

// Computes a tile of `rows` rows, in [1, kMaxRows].
template <class Arithmetic>
void ComputeTile(size_t rows, const Tile<typename Arithmetic::Input>& tile) {
  using Function = void (*)(const Tile<typename Arithmetic::Input>&);
  static constexpr auto kFunctions = []<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return std::array<Function, kMaxRows>{Arithmetic::template Compute<kIndex + 1>...};
  }
  (std::make_index_sequence<kMaxRows>());
  kFunctions[rows - 1](tile);
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

// One panel of the rows [row_begin, row_end). `last`: no other panel follows.
template <class Arithmetic>
void PanelOfRows(const LinearArgs& args, const typename Arithmetic::Input* x, size_t row_begin,
                 size_t row_end, size_t panel, bool last) {
  const size_t padded = PaddedInputs(args.w->k), panel_bytes = kPanel * padded * sizeof(uint16_t);
  const size_t column = panel * kPanel, columns = std::min(kPanel, args.w->n - column);
  const std::byte* weights = static_cast<const std::byte*>(args.w->data) + panel * panel_bytes;
  // Where the panel has columns beyond n, y and the bias have no room for them.
  float edge[kMaxRows * kPanel];
  float edge_bias[kPanel] = {};
  const bool whole = columns == kPanel;
  Tile<typename Arithmetic::Input> tile;
  tile.x_stride = padded;
  tile.panel = reinterpret_cast<const uint16_t*>(weights);
  tile.pairs = padded / 2;
  tile.bias = args.bias != nullptr ? args.bias + column : nullptr;
  tile.y_stride = whole ? args.y_stride : kPanel;
  if (!whole && tile.bias != nullptr) {
    std::memcpy(edge_bias, tile.bias, columns * sizeof(float));
    tile.bias = edge_bias;
  }
  const size_t passes = (row_end - row_begin + kMaxRows - 1) / kMaxRows;
  size_t row = row_begin;
  for (size_t pass = 0; pass < passes; ++pass) {
    const size_t rows = NextTileRows(row_end - row, kMaxRows);
    float* y = args.y + row * args.y_stride + column;
    tile.x = x + row * padded;
    tile.y = whole ? y : edge;
    tile.ahead = WeightsAhead(weights, panel_bytes, last, pass, passes);
    ComputeTile<Arithmetic>(rows, tile);
    for (size_t i = 0; !whole && i < rows; ++i) {
      std::memcpy(y + i * args.y_stride, edge + i * kPanel, columns * sizeof(float));
    }
    row += rows;
  }
}

template <class Arithmetic>
void Panels(const LinearArgs& args, const void* inputs, size_t panel_begin, size_t panel_end) {
  using Input = typename Arithmetic::Input;
  // Rows whose inputs stay in the second-level cache while all panels pass by.
  const size_t row_bytes = PaddedInputs(args.w->k) * sizeof(Input);
  const size_t cached = std::max<size_t>(1, (size_t{768} << 10) / row_bytes);
  const size_t row_block = (cached + kMaxRows - 1) / kMaxRows * kMaxRows;
  for (size_t r = 0; r < args.rows; r += row_block) {
    for (size_t p = panel_begin; p < panel_end; ++p) {
      PanelOfRows<Arithmetic>(args, static_cast<const Input*>(inputs), r,
                              std::min(args.rows, r + row_block), p, p + 1 == panel_end);
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
