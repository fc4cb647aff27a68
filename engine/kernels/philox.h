// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC'11): random numbers as a pure function of (key,
// counter), so that a resumed or migrated sequence draws the same tokens.
#pragma once

#include <array>
#include <cstdint>

#include "engine/kernels/host_device.h"

namespace tandem::engine {

// The counter becomes the random bits.
TANDEM_HOST_DEVICE inline void PhiloxRounds(uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0;
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1;
    counter[3] = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

inline std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter,
                                          std::array<uint32_t, 2> key) {
  uint32_t bits[4] = {counter[0], counter[1], counter[2], counter[3]};
  PhiloxRounds(bits, key[0], key[1]);
  return {bits[0], bits[1], bits[2], bits[3]};
}

// Uniform in [0, 1) with 53 random bits, for the token at `position` of a sequence with `seed`.
TANDEM_HOST_DEVICE inline double UniformAt(uint64_t seed, uint64_t position) {
  uint32_t bits[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
  PhiloxRounds(bits, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return static_cast<double>((uint64_t{bits[0]} << 32 | bits[1]) >> 11) * 0x1p-53;
}

}  // namespace tandem::engine
