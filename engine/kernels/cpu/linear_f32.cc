// The float32 matrix product of linear.h.
#include <algorithm>
#include <cstring>

#include "engine/kernels/cpu/linear.h"
#include "engine/kernels/cpu/linear_internal.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/kernels/cpu/linear_f32.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tandem::engine {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::ScalableTag<float>;
using V = hn::Vec<D>;

// Registers: kMaxRows * 2 accumulators, 2 weight vectors, 1 broadcast.
#if HWY_TARGET == HWY_AVX3
constexpr size_t kMaxRows = 12;
#elif HWY_TARGET == HWY_AVX2
constexpr size_t kMaxRows = 6;
#else
constexpr size_t kMaxRows = 4;
#endif

// kRows rows times two vectors of columns. w: first of those columns in its panel.
template <size_t kRows>
HWY_INLINE void Tile(const float* HWY_RESTRICT x, size_t x_stride, const float* HWY_RESTRICT w,
                     size_t k, WeightsAhead ahead, const float* HWY_RESTRICT bias,
                     float* HWY_RESTRICT y, size_t y_stride) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V sum0[kRows], sum1[kRows];
  for (size_t r = 0; r < kRows; ++r) sum0[r] = sum1[r] = hn::Zero(d);
  for (size_t i = 0; i < k; ++i) {
    ahead.Prefetch();
    const V w0 = hn::Load(d, w + i * kPanel);
    const V w1 = hn::Load(d, w + i * kPanel + lanes);
    for (size_t r = 0; r < kRows; ++r) {
      const V value = hn::Set(d, x[r * x_stride + i]);
      sum0[r] = hn::MulAdd(value, w0, sum0[r]);
      sum1[r] = hn::MulAdd(value, w1, sum1[r]);
    }
  }
  if (bias != nullptr) {
    const V b0 = hn::LoadU(d, bias), b1 = hn::LoadU(d, bias + lanes);
    for (size_t r = 0; r < kRows; ++r) {
      sum0[r] = hn::Add(sum0[r], b0);
      sum1[r] = hn::Add(sum1[r], b1);
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    hn::StoreU(sum0[r], d, y + r * y_stride);
    hn::StoreU(sum1[r], d, y + r * y_stride + lanes);
  }
}

template <size_t kRows>
void PanelRows(const float* x, size_t x_stride, const float* panel, size_t k, WeightsAhead ahead,
               const float* bias, float* y, size_t y_stride) {
  const size_t step = 2 * hn::Lanes(D());
  for (size_t c = 0; c < kPanel; c += step) {
    Tile<kRows>(x, x_stride, panel + c, k, ahead, bias != nullptr ? bias + c : nullptr, y + c,
                y_stride);
  }
}

using PanelFunction = void (*)(const float*, size_t, const float*, size_t, WeightsAhead,
                               const float*, float*, size_t);

// PanelRows<rows> for rows in [1, kMaxRows].
PanelFunction PanelRowsFor(size_t rows) {
  static constexpr PanelFunction kFunctions[] = {
    PanelRows<1>,
    PanelRows<2>,
    PanelRows<3>,
    PanelRows<4>,
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
    PanelRows<5>,
    PanelRows<6>,
#endif
#if HWY_TARGET == HWY_AVX3
    PanelRows<7>,
    PanelRows<8>,
    PanelRows<9>,
    PanelRows<10>,
    PanelRows<11>,
    PanelRows<12>,
#endif
  };
  return kFunctions[rows - 1];
}

void LinearPanels(const LinearArgs& args, size_t panel_begin, size_t panel_end) {
  const float* weights = static_cast<const float*>(args.w->data);
  const size_t n = args.w->n, k = args.w->k;
  // Rows whose inputs stay in the second-level cache while all panels pass by.
  const size_t cached = std::max<size_t>(1, (size_t{768} << 10) / (k * sizeof(float)));
  const size_t row_block = (cached + kMaxRows - 1) / kMaxRows * kMaxRows;
  HWY_ALIGN float edge[kMaxRows * kPanel];
  HWY_ALIGN float edge_bias[kPanel] = {};
  for (size_t r0 = 0; r0 < args.rows; r0 += row_block) {
    const size_t r1 = std::min(args.rows, r0 + row_block);
    for (size_t p = panel_begin; p < panel_end; ++p) {
      const size_t column = p * kPanel, columns = std::min(kPanel, n - column);
      const float* bias = args.bias != nullptr ? args.bias + column : nullptr;
      if (columns < kPanel && bias != nullptr) {
        std::memcpy(edge_bias, bias, columns * sizeof(float));
        bias = edge_bias;
      }
      const float* panel = weights + p * kPanel * k;
      const size_t passes = (r1 - r0 + kMaxRows - 1) / kMaxRows;
      size_t r = r0;
      for (size_t pass = 0; pass < passes; ++pass) {
        const size_t rows = NextTileRows(r1 - r, kMaxRows);
        const WeightsAhead ahead(reinterpret_cast<const std::byte*>(panel),
                                 kPanel * k * sizeof(float), p + 1 == panel_end, pass, passes);
        float* y = args.y + r * args.y_stride + column;
        const bool whole = columns == kPanel;
        PanelRowsFor(rows)(args.x + r * args.x_stride, args.x_stride, panel, k, ahead, bias,
                           whole ? y : edge, whole ? args.y_stride : kPanel);
        for (size_t i = 0; !whole && i < rows; ++i) {
          std::memcpy(y + i * args.y_stride, edge + i * kPanel, columns * sizeof(float));
        }
        r += rows;
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tandem::engine
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tandem::engine {

HWY_EXPORT(LinearPanels);

void LinearFloat32Panels(const LinearArgs& args, size_t panel_begin, size_t panel_end) {
  HWY_DYNAMIC_DISPATCH(LinearPanels)(args, panel_begin, panel_end);
}

}  // namespace tandem::engine
#endif
