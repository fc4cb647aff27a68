// One transfer at the sender: what was sent of which block, and its digests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/transfer_key.h"

namespace tandem::kvtransfer {

// Consecutive ordinals of one layer: becomes one DATA frame.
struct PushedRun {
  int layer = 0;
  int32_t ordinal_begin = 0;
  std::vector<int32_t> source_blocks;
};

// Not thread-safe: of its peer's writer thread.
struct OutgoingTransfer {
  OutgoingTransfer(KvSendTarget target, int num_layers, std::string transport);

  TransferKey key() const { return {target.id, target.epoch}; }
  size_t Bit(int layer, int32_t ordinal) const {
    return static_cast<size_t>(layer) * target.target_blocks.size() + static_cast<size_t>(ordinal);
  }
  // OK if the run names layers and ordinals of this transfer and blocks of `region`.
  absl::Status Check(const PushedRun& run, const KvRegion& region) const;
  // True if some piece of the run was sent before.
  bool AnySent(const PushedRun& run) const;
  // Digests the run's bytes and marks them sent.
  void Account(const PushedRun& run, const KvRegion& region);
  // The payload of FINISH.
  std::string DigestPayload() const;

  KvSendTarget target;
  std::vector<bool> sent;         // [layer][ordinal]
  size_t missing = 0;             // pieces that were never pushed
  std::vector<uint64_t> digests;  // by ordinal
  bool finished = false;          // FINISH is out
  absl::Time finished_at;
  absl::Duration busy;                                  // inside Send() with data
  absl::Time answer_deadline = absl::InfiniteFuture();  // for RESULT
  TransferStats stats;
};

}  // namespace tandem::kvtransfer
