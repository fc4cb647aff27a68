// Embedding, RMSNorm, SiLU, residual add and rotation: one pass over memory each.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/kernels/cpu/add.h"
#include "engine/kernels/cpu/embedding.h"
#include "engine/kernels/cpu/rms_norm.h"
#include "engine/kernels/cpu/rope.h"
#include "engine/kernels/cpu/silu_mul.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/kernels/cpu/elementwise.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// Must follow foreach_target.h.
#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tandem::engine {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::ScalableTag<float>;
using D1 = hn::CappedTag<float, 1>;  // for what is left after whole vectors: same arithmetic

void RmsNormRows(const float* x, const float* weight, float epsilon, size_t rows, size_t width,
                 float* out) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  for (size_t r = 0; r < rows; ++r, x += width, out += width) {
    auto squares = hn::Zero(d);
    size_t c = 0;
    for (; c + lanes <= width; c += lanes) {
      const auto v = hn::LoadU(d, x + c);
      squares = hn::MulAdd(v, v, squares);
    }
    float sum = hn::GetLane(hn::SumOfLanes(d, squares));
    for (; c < width; ++c) sum += x[c] * x[c];
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
    const auto scale = hn::Set(d, inverse);
    for (c = 0; c + lanes <= width; c += lanes) {
      const auto v = hn::Mul(hn::LoadU(d, x + c), scale);
      hn::StoreU(hn::Mul(v, hn::LoadU(d, weight + c)), d, out + c);
    }
    for (; c < width; ++c) out[c] = x[c] * inverse * weight[c];
  }
}

template <class DD>
HWY_INLINE void SiluMulAt(DD d, const float* gate, const float* up, float* out) {
  const auto g = hn::LoadU(d, gate);
  // Exp is only defined where its result is finite; beyond, the product vanishes anyway.
  const auto power = hn::Min(hn::Neg(g), hn::Set(d, 87.0f));
  const auto sigmoid_inverse = hn::Add(hn::Set(d, 1.0f), hn::Exp(d, power));
  hn::StoreU(hn::Mul(hn::Div(g, sigmoid_inverse), hn::LoadU(d, up)), d, out);
}

void SiluMulRows(const float* gate_up, size_t rows, size_t width, float* out) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  for (size_t r = 0; r < rows; ++r, gate_up += 2 * width, out += width) {
    size_t c = 0;
    for (; c + lanes <= width; c += lanes) SiluMulAt(d, gate_up + c, gate_up + width + c, out + c);
    for (; c < width; ++c) SiluMulAt(D1(), gate_up + c, gate_up + width + c, out + c);
  }
}

void AddRange(float* x, const float* y, size_t count) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    hn::StoreU(hn::Add(hn::LoadU(d, x + i), hn::LoadU(d, y + i)), d, x + i);
  }
  for (; i < count; ++i) x[i] += y[i];
}

template <class DD>
HWY_INLINE void RotateAt(DD d, float* low, float* high, const float* cos, const float* sin) {
  const auto a = hn::LoadU(d, low), b = hn::LoadU(d, high);
  const auto c = hn::LoadU(d, cos), s = hn::LoadU(d, sin);
  hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, low);
  hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, high);
}

void RopeRows(float* x, size_t rows, size_t stride, size_t heads, size_t half, const float* cos,
              const float* sin) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  for (size_t r = 0; r < rows; ++r, x += stride, cos += half, sin += half) {
    for (size_t h = 0; h < heads; ++h) {
      float* head = x + h * 2 * half;
      size_t i = 0;
      for (; i + lanes <= half; i += lanes)
        RotateAt(d, head + i, head + half + i, cos + i, sin + i);
      for (; i < half; ++i) RotateAt(D1(), head + i, head + half + i, cos + i, sin + i);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tandem::engine
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tandem::engine {
namespace {

// Elements per member below which one thread is faster.
constexpr size_t kGrain = 16384;

size_t RowGrain(size_t width) { return 1 + kGrain / (width + 1); }

}  // namespace

HWY_EXPORT(RmsNormRows);
HWY_EXPORT(SiluMulRows);
HWY_EXPORT(AddRange);
HWY_EXPORT(RopeRows);

void GatherEmbedding(const void* table, Element element, size_t width, const int32_t* ids,
                     size_t count, float* out, Threads* threads) {
  threads->ForRanges(count, RowGrain(width), [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      const size_t first = static_cast<size_t>(ids[r]) * width;
      for (size_t c = 0; c < width; ++c) {
        out[r * width + c] = LoadElement(table, element, first + c);
      }
    }
  });
}

void RmsNorm(const float* x, const float* weight, float epsilon, size_t rows, size_t width,
             float* out, Threads* threads) {
  threads->ForRanges(rows, RowGrain(width), [&](size_t begin, size_t end) {
    HWY_DYNAMIC_DISPATCH(RmsNormRows)
    (x + begin * width, weight, epsilon, end - begin, width, out + begin * width);
  });
}

void RmsNormHeads(float* x, size_t rows, size_t stride, size_t heads, size_t head_dim,
                  const float* weight, float epsilon, Threads* threads) {
  threads->ForRanges(rows, RowGrain(heads * head_dim), [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      float* row = x + r * stride;
      HWY_DYNAMIC_DISPATCH(RmsNormRows)(row, weight, epsilon, heads, head_dim, row);
    }
  });
}

void SiluMul(const float* gate_up, size_t rows, size_t width, float* out, Threads* threads) {
  threads->ForRanges(rows, RowGrain(4 * width), [&](size_t begin, size_t end) {
    HWY_DYNAMIC_DISPATCH(SiluMulRows)
    (gate_up + begin * 2 * width, end - begin, width, out + begin * width);
  });
}

void AddInPlace(float* x, const float* y, size_t count, Threads* threads) {
  threads->ForRanges(count, kGrain, [&](size_t begin, size_t end) {
    HWY_DYNAMIC_DISPATCH(AddRange)(x + begin, y + begin, end - begin);
  });
}

void RopeTables(const float* frequencies, int head_dim, float scale, const int32_t* positions,
                size_t count, float* cos, float* sin, Threads* threads) {
  const size_t half = static_cast<size_t>(head_dim) / 2;
  threads->ForRanges(count, 1 + 2048 / half, [&](size_t begin, size_t end) {
    for (size_t r = begin; r < end; ++r) {
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(positions[r]) * frequencies[i];
        cos[r * half + i] = std::cos(angle) * scale;
        sin[r * half + i] = std::sin(angle) * scale;
      }
    }
  });
}

void ApplyRope(float* x, size_t rows, size_t stride, int heads, int head_dim, const float* cos,
               const float* sin, Threads* threads) {
  const size_t half = static_cast<size_t>(head_dim) / 2, num_heads = static_cast<size_t>(heads);
  threads->ForRanges(rows, RowGrain(num_heads * half), [&](size_t begin, size_t end) {
    HWY_DYNAMIC_DISPATCH(RopeRows)
    (x + begin * stride, end - begin, stride, num_heads, half, cos + begin * half,
     sin + begin * half);
  });
}

}  // namespace tandem::engine
#endif
