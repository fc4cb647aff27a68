// All transfers that one receiver knows, and which blocks they may still write.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "kvtransfer/channel/incoming_transfer.h"

namespace tandem::kvtransfer {

// Thread-safe. Calls no transfer while it holds its lock.
class TransferTable {
 public:
  // Bounds on what one receiver remembers.
  static constexpr size_t kMaxLive = 65536;
  static constexpr size_t kMaxRemembered = 4096;  // quiet ones, so that late frames are recognised

  explicit TransferTable(int num_blocks);

  // ALREADY_EXISTS for a known key, INVALID_ARGUMENT for a bad block, FAILED_PRECONDITION for a
  // block of a transfer that is not quiet, RESOURCE_EXHAUSTED beyond kMaxLive.
  absl::Status Insert(std::shared_ptr<IncomingTransfer> transfer);
  std::shared_ptr<IncomingTransfer> Find(const TransferKey& key) const;
  // Not quiet yet.
  std::vector<std::shared_ptr<IncomingTransfer>> Live() const;
  // `transfer` has become quiet: its blocks may be named by others; remembered for a while.
  void Release(const IncomingTransfer& transfer);

 private:
  absl::Status CheckBlocks(const IncomingTransfer& transfer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<TransferKey, std::shared_ptr<IncomingTransfer>> live_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<TransferKey, std::shared_ptr<IncomingTransfer>> remembered_
      ABSL_GUARDED_BY(mutex_);
  std::deque<TransferKey> remembered_order_ ABSL_GUARDED_BY(mutex_);
  std::vector<const IncomingTransfer*> owner_ ABSL_GUARDED_BY(mutex_);  // [block]
};

}  // namespace tandem::kvtransfer
