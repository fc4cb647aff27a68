// Names one attempt of one transfer on both ends and on the wire.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "fmt/format.h"

#include "common/base/transfer_id.h"

namespace tandem::kvtransfer {

struct TransferKey {
  TransferId id;
  uint64_t epoch = 0;

  bool operator==(const TransferKey&) const = default;
  std::string ToString() const { return fmt::format("{}.{}", id.ToHex(), epoch); }

  template <typename H>
  friend H AbslHashValue(H h, const TransferKey& key) {
    return H::combine(std::move(h), key.id, key.epoch);
  }
};

}  // namespace tandem::kvtransfer
