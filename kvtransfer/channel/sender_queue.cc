#include "kvtransfer/channel/sender_queue.h"

#include <algorithm>
#include <utility>

#include "common/base/clock.h"

namespace tandem::kvtransfer {
namespace {

// How long TakeItem() waits for blocks to be computed: after it, aborts and replies are looked at.
constexpr absl::Duration kReadySlice = absl::Milliseconds(2);

}  // namespace

void SenderQueue::Wake() {
  // An eventfd costs a system call, so only a thread that sleeps is told.
  if (std::exchange(sleeping_, false) && connection_ != nullptr) connection_->Interrupt();
}

void SenderQueue::Push(SendItem item) {
  absl::MutexLock lock(&mutex_);
  items_.push_back(std::move(item));
  Wake();
}

void SenderQueue::PushAbort(const TransferKey& key) {
  absl::MutexLock lock(&mutex_);
  aborts_.push_back(key);
  Wake();
}

void SenderQueue::Stop() {
  absl::MutexLock lock(&mutex_);
  stopping_ = true;
  if (connection_ != nullptr) connection_->Shutdown();  // ends a Send() that waits
  Wake();
}

bool SenderQueue::stopping() const {
  absl::MutexLock lock(&mutex_);
  return stopping_;
}

bool SenderQueue::empty() const {
  absl::MutexLock lock(&mutex_);
  return items_.empty() && aborts_.empty();
}

bool SenderQueue::SetConnection(std::shared_ptr<KvConnection> connection) {
  absl::MutexLock lock(&mutex_);
  connection_ = stopping_ ? nullptr : std::move(connection);
  return !stopping_;
}

bool SenderQueue::connected() const {
  absl::MutexLock lock(&mutex_);
  return connection_ != nullptr;
}

void SenderQueue::Wait(bool items_wanted, absl::Time deadline) {
  const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !aborts_.empty() || !items_.empty();
  };
  std::shared_ptr<KvConnection> connection;
  {
    absl::MutexLock lock(&mutex_);
    if (connection_ == nullptr) {
      mutex_.AwaitWithTimeout(absl::Condition(&due), deadline - Clock::Real()->Now());
      return;
    }
    if (stopping_ || !aborts_.empty() || (items_wanted && !items_.empty())) return;
    sleeping_ = true;
    connection = connection_;
  }
  // Its end, whatever the reason, is seen by whoever reads it next.
  (void)connection->WaitReadableOrInterrupt(deadline - Clock::Real()->Now());
  absl::MutexLock lock(&mutex_);
  sleeping_ = false;
}

std::optional<SendItem> SenderQueue::TakeItem() {
  std::shared_ptr<const ReadyEvent> awaited;
  {
    absl::MutexLock lock(&mutex_);
    if (items_.empty()) return std::nullopt;
    if (const auto* push = std::get_if<PushItem>(&items_.front())) awaited = push->ready;
    if (awaited == nullptr || awaited->Ready()) {
      SendItem item = std::move(items_.front());
      items_.pop_front();
      if (auto* push = std::get_if<PushItem>(&item)) JoinLayers(push);
      return item;
    }
  }
  awaited->WaitFor(kReadySlice);
  return std::nullopt;
}

void SenderQueue::JoinLayers(PushItem* push) {
  PushedRun& run = push->run;
  const size_t bytes = run.source_blocks.size() * layer_bytes_;
  while (!items_.empty()) {
    const auto* next = std::get_if<PushItem>(&items_.front());
    const auto layers = static_cast<size_t>(run.layer_count);
    if (next == nullptr || next->key != push->key || (layers + 1) * bytes > frame_bytes_ ||
        next->run.layer_begin != run.layer_begin + run.layer_count ||
        next->run.ordinal_begin != run.ordinal_begin ||
        next->run.source_blocks != run.source_blocks ||
        (next->ready != nullptr && !next->ready->Ready())) {
      return;
    }
    ++run.layer_count;
    items_.pop_front();
  }
}

std::deque<TransferKey> SenderQueue::TakeAborts() {
  absl::MutexLock lock(&mutex_);
  return std::exchange(aborts_, {});
}

std::optional<KvSendTarget> SenderQueue::TakeOpen(const TransferKey& key) {
  absl::MutexLock lock(&mutex_);
  const auto opens = [&](const SendItem& item) {
    const auto* open = std::get_if<OpenItem>(&item);
    return open != nullptr && TransferKey{open->target.id, open->target.epoch} == key;
  };
  const auto it = std::find_if(items_.begin(), items_.end(), opens);
  if (it == items_.end()) return std::nullopt;
  KvSendTarget target = std::move(std::get<OpenItem>(*it).target);
  items_.erase(it);
  return target;
}

std::vector<KvSendTarget> SenderQueue::TakeAllOpens() {
  absl::MutexLock lock(&mutex_);
  std::vector<KvSendTarget> targets;
  for (SendItem& item : items_) {
    if (auto* open = std::get_if<OpenItem>(&item)) targets.push_back(std::move(open->target));
  }
  items_.clear();
  return targets;
}

}  // namespace tandem::kvtransfer
