#include "engine/model/dummy_weights.h"

#include <algorithm>

#include "common/base/block_hash.h"
#include "engine/kernels/dummy_value.h"
#include "engine/kernels/element.h"

namespace tandem::engine {
uint64_t DummyKey(std::string_view name, uint64_t seed) {
  return HashBytes(name).low ^ DummyMix(seed);
}

void FillDummyTensor(std::string_view name, uint64_t seed, std::span<uint16_t> out,
                     Threads* threads) {
  if (name.ends_with("norm.weight")) {
    std::fill(out.begin(), out.end(), FloatToBF16(1.0f));
    return;
  }
  const uint64_t key = DummyKey(name, seed);
  threads->ForRanges(out.size(), 65536, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) out[i] = FloatToBF16(DummyValue(key, i));
  });
}

}  // namespace tandem::engine
