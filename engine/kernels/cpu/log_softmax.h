// Reductions over one row of logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tandem::engine {

struct RowMaximum {
  float value = 0;
  size_t index = 0;      // lowest among equals
  bool has_nan = false;  // then value and index mean nothing
};
RowMaximum FindMaximum(const float* row, size_t count);

// ln(sum_i exp(row[i])), stable, the sum in float64; `maximum` as found by FindMaximum.
double LogSumExp(const float* row, size_t count, float maximum);

// Indices of the `n` largest, largest first, ties lowest index first; fewer if count < n.
std::vector<int32_t> TopIndices(const float* row, size_t count, size_t n);

}  // namespace tandem::engine
