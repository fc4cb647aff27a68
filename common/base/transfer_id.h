// Names one shipment of KV blocks. 128 random bits, so that ids of different processes never meet.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "common/base/block_hash.h"

namespace tandem {

struct TransferId {
  Hash128 value;

  bool operator==(const TransferId&) const = default;
  static TransferId Random();
  std::string ToBytes() const { return value.ToBytes(); }
  static bool FromBytes(std::string_view bytes, TransferId* out) {
    return Hash128::FromBytes(bytes, &out->value);
  }
  std::string ToHex() const { return value.ToHex(); }

  template <typename H>
  friend H AbslHashValue(H h, const TransferId& id) {
    return H::combine(std::move(h), id.value);
  }
};

// Bytes from the system's random source; for ids, tokens and seeds.
std::string RandomBytes(size_t size);
uint64_t RandomUint64();

}  // namespace tandem
