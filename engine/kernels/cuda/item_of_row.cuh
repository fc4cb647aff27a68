// Where a row of a step belongs (RaggedBatch in engine/kernels/ops.h).
#pragma once

#include <cstdint>

namespace tandem::engine::cuda {

// The last of `items` items that begins at `row` or before it. first_rows: [items + 1], rising.
__device__ inline int ItemOfRow(const int32_t* first_rows, int items, int row) {
  int low = 0, high = items - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first_rows[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace tandem::engine::cuda
