#include "kvtransfer/channel/transfer_table.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {

TransferTable::TransferTable(int num_blocks) : owner_(static_cast<size_t>(num_blocks), nullptr) {}

absl::Status TransferTable::Insert(std::shared_ptr<IncomingTransfer> transfer) {
  const TransferKey key = transfer->key();
  absl::MutexLock lock(&mutex_);
  if (live_.contains(key) || remembered_.contains(key)) {
    return AlreadyExists("transfer {} is known already; use a new epoch", key.ToString());
  }
  if (live_.size() >= kMaxLive) {
    return ResourceExhausted("{} transfers are under way, the limit", live_.size());
  }
  absl::Status status = CheckBlocks(*transfer);
  if (!status.ok()) {
    for (const int32_t block : transfer->blocks()) {
      if (block < 0 || static_cast<size_t>(block) >= owner_.size()) continue;
      const IncomingTransfer*& owner = owner_[static_cast<size_t>(block)];
      if (owner == transfer.get()) owner = nullptr;
    }
    return status;
  }
  live_.emplace(key, std::move(transfer));
  return absl::OkStatus();
}

absl::Status TransferTable::CheckBlocks(const IncomingTransfer& transfer) {
  for (const int32_t block : transfer.blocks()) {
    if (block < 0 || static_cast<size_t>(block) >= owner_.size()) {
      return InvalidArgument("block {} must be in [0, {})", block, owner_.size());
    }
    const IncomingTransfer*& owner = owner_[static_cast<size_t>(block)];
    if (owner == &transfer) return InvalidArgument("block {} is named twice", block);
    if (owner != nullptr) {
      return FailedPrecondition("block {} may still be written by transfer {}, which is not quiet",
                                block, owner->key().ToString());
    }
    owner = &transfer;
  }
  return absl::OkStatus();
}

std::shared_ptr<IncomingTransfer> TransferTable::Find(const TransferKey& key) const {
  absl::MutexLock lock(&mutex_);
  if (const auto it = live_.find(key); it != live_.end()) return it->second;
  if (const auto it = remembered_.find(key); it != remembered_.end()) return it->second;
  return nullptr;
}

std::vector<std::shared_ptr<IncomingTransfer>> TransferTable::Live() const {
  absl::MutexLock lock(&mutex_);
  std::vector<std::shared_ptr<IncomingTransfer>> out;
  out.reserve(live_.size());
  for (const auto& [key, transfer] : live_) out.push_back(transfer);
  return out;
}

void TransferTable::Release(const IncomingTransfer& transfer) {
  std::shared_ptr<IncomingTransfer> forgotten;  // destroyed after the lock
  absl::MutexLock lock(&mutex_);
  const auto it = live_.find(transfer.key());
  if (it == live_.end()) return;
  for (const int32_t block : transfer.blocks()) owner_[static_cast<size_t>(block)] = nullptr;
  remembered_order_.push_back(transfer.key());
  remembered_.emplace(transfer.key(), std::move(it->second));
  live_.erase(it);
  if (remembered_order_.size() > kMaxRemembered) {
    const auto oldest = remembered_.find(remembered_order_.front());
    forgotten = std::move(oldest->second);
    remembered_.erase(oldest);
    remembered_order_.pop_front();
  }
}

}  // namespace tandem::kvtransfer
