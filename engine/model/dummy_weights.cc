#include "engine/model/dummy_weights.h"

#include <algorithm>

#include "common/base/block_hash.h"
#include "engine/kernels/element.h"

namespace tandem::engine {
namespace {

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a counter-based stream.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

void FillDummyTensor(std::string_view name, uint64_t seed, std::span<uint16_t> out,
                     Threads* threads) {
  if (name.ends_with("norm.weight")) {
    std::fill(out.begin(), out.end(), FloatToBF16(1.0f));
    return;
  }
  const uint64_t key = HashBytes(name).low ^ Mix(seed);
  constexpr float kHalfWidth = 0.0346410162f;  // 0.02 * sqrt(3)
  threads->ForRanges(out.size(), 65536, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      const float unit = static_cast<float>(Mix(key + i) >> 40) * 0x1p-23f - 1.0f;
      out[i] = FloatToBF16(unit * kHalfWidth);
    }
  });
}

}  // namespace tandem::engine
