#include "kvtransfer/transport/probe_pattern.h"

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace tandem::kvtransfer {

ConstBytes ProbePattern() {
  static const auto* pattern = [] {
    auto* bytes = new std::vector<std::byte>(kMaxProbePattern);
    std::mt19937_64 random;  // NOLINT: it need not surprise anybody
    for (size_t at = 0; at < bytes->size(); at += sizeof(uint64_t)) {
      const uint64_t word = random();
      std::memcpy(bytes->data() + at, &word, sizeof(word));
    }
    return bytes;
  }();
  return *pattern;
}

}  // namespace tandem::kvtransfer
