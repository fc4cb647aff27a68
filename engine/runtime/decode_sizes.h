// The batch sizes for which decode steps are recorded (CUDA graphs).
#pragma once

#include <algorithm>
#include <vector>

namespace tandem::engine {

// Ascending, the last one is `largest`. A step that only decodes is padded to the next of them: by
// less than a quarter from 16 sequences on, where a row costs anything.
inline std::vector<int> DecodeSizes(int largest) {
  std::vector<int> sizes;
  for (int size = 1; size < largest;) {
    sizes.push_back(size);
    size += size < 2 ? 1 : size < 4 ? 2 : size < 16 ? 4 : size < 64 ? 8 : size < 128 ? 16 : 32;
  }
  if (largest > 0) sizes.push_back(largest);
  return sizes;
}

// The least of `sizes` that holds `count`; 0: none does.
inline int DecodeSizeFor(int count, const std::vector<int>& sizes) {
  const auto at = std::lower_bound(sizes.begin(), sizes.end(), count);
  return at == sizes.end() ? 0 : *at;
}

}  // namespace tandem::engine
