#include "engine/kernels/cpu/log_softmax.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "engine/kernels/cpu/log_softmax.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
// Must follow foreach_target.h.
#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tandem::engine {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::ScalableTag<float>;
using D1 = hn::CappedTag<float, 1>;

void MaximumOf(const float* row, size_t count, float* value, bool* has_nan) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  auto highest = hn::Set(d, row[0]);
  auto not_nan = hn::Eq(highest, highest);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto v = hn::LoadU(d, row + i);
    not_nan = hn::And(not_nan, hn::Eq(v, v));
    highest = hn::Max(highest, v);
  }
  *has_nan = !hn::AllTrue(d, not_nan);
  *value = hn::GetLane(hn::MaxOfLanes(d, highest));
  for (; i < count; ++i) {
    *has_nan |= row[i] != row[i];
    if (row[i] > *value) *value = row[i];
  }
}

template <class DD>
HWY_INLINE hn::Vec<DD> ExpAt(DD d, const float* row, float maximum) {
  return hn::Exp(d, hn::Sub(hn::LoadU(d, row), hn::Set(d, maximum)));
}

// Sums of a few vectors in float32, sums of those in float64.
double SumExp(const float* row, size_t count, float maximum) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  constexpr size_t kVectors = 8;
  double total = 0;
  size_t i = 0;
  while (i + lanes <= count) {
    auto sum = hn::Zero(d);
    for (size_t v = 0; v < kVectors && i + lanes <= count; ++v, i += lanes) {
      sum = hn::Add(sum, ExpAt(d, row + i, maximum));
    }
    total += static_cast<double>(hn::GetLane(hn::SumOfLanes(d, sum)));
  }
  for (; i < count; ++i) {
    total += static_cast<double>(hn::GetLane(ExpAt(D1(), row + i, maximum)));
  }
  return total;
}

}  // namespace HWY_NAMESPACE
}  // namespace tandem::engine
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tandem::engine {

HWY_EXPORT(MaximumOf);
HWY_EXPORT(SumExp);

RowMaximum FindMaximum(const float* row, size_t count) {
  RowMaximum maximum;
  if (count == 0) return maximum;
  HWY_DYNAMIC_DISPATCH(MaximumOf)(row, count, &maximum.value, &maximum.has_nan);
  if (maximum.has_nan) return maximum;
  maximum.index = static_cast<size_t>(std::find(row, row + count, maximum.value) - row);
  return maximum;
}

double LogSumExp(const float* row, size_t count, float maximum) {
  return static_cast<double>(maximum) + std::log(HWY_DYNAMIC_DISPATCH(SumExp)(row, count, maximum));
}

std::vector<int32_t> TopIndices(const float* row, size_t count, size_t n) {
  n = std::min(n, count);
  std::vector<int32_t> best;  // a heap whose front is the worst of the best
  if (n == 0) return best;
  best.reserve(n + 1);
  const auto better = [row](int32_t a, int32_t b) {
    return row[a] != row[b] ? row[a] > row[b] : a < b;
  };
  for (size_t i = 0; i < count; ++i) {
    // Indices grow, so an equal value is never better than what is already held.
    if (best.size() == n && !(row[i] > row[best.front()])) continue;
    best.push_back(static_cast<int32_t>(i));
    std::push_heap(best.begin(), best.end(), better);
    if (best.size() > n) {
      std::pop_heap(best.begin(), best.end(), better);
      best.pop_back();
    }
  }
  std::sort_heap(best.begin(), best.end(), better);
  return best;
}

}  // namespace tandem::engine
#endif
