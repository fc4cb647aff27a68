#include "kvtransfer/channel/sender_queue.h"

#include <algorithm>
#include <utility>

#include "common/base/clock.h"

namespace tandem::kvtransfer {
namespace {

// How long TakeItem() waits for blocks to be computed: after it, aborts and replies are looked at.
constexpr absl::Duration kReadySlice = absl::Milliseconds(2);

TransferKey KeyOf(const SendItem& item) {
  if (const auto* open = std::get_if<OpenItem>(&item)) return {open->target.id, open->target.epoch};
  if (const auto* push = std::get_if<PushItem>(&item)) return push->key;
  return std::get<FinishItem>(item).key;
}

}  // namespace

void SenderQueue::Wake() {
  // An eventfd costs a system call, so only a thread that sleeps is told.
  if (std::exchange(sleeping_, false) && connection_ != nullptr) connection_->Interrupt();
}

void SenderQueue::SetFrameBytes(size_t frame_bytes) {
  absl::MutexLock lock(&mutex_);
  frame_bytes_ = frame_bytes;
}

size_t SenderQueue::frame_bytes() const {
  absl::MutexLock lock(&mutex_);
  return frame_bytes_;
}

void SenderQueue::Push(SendItem item) {
  absl::MutexLock lock(&mutex_);
  const TransferKey key = KeyOf(item);
  const auto [it, is_new] = lanes_.try_emplace(key);
  if (is_new) {
    it->second.credit = static_cast<int64_t>(frame_bytes_);
    turns_.push_back(key);
  }
  it->second.items.push_back(std::move(item));
  Wake();
}

void SenderQueue::PushAbort(const TransferKey& key) {
  absl::MutexLock lock(&mutex_);
  aborts_.push_back(key);
  // Whether it waits for the peer to say something or to take something.
  sleeping_ = false;
  if (connection_ != nullptr) connection_->Interrupt();
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
  return lanes_.empty() && aborts_.empty();
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
    return stopping_ || !aborts_.empty() || !lanes_.empty();
  };
  std::shared_ptr<KvConnection> connection;
  {
    absl::MutexLock lock(&mutex_);
    if (connection_ == nullptr) {
      mutex_.AwaitWithTimeout(absl::Condition(&due), deadline - Clock::Real()->Now());
      return;
    }
    if (stopping_ || !aborts_.empty() || (items_wanted && !lanes_.empty())) return;
    sleeping_ = true;
    connection = connection_;
  }
  // Its end, whatever the reason, is seen by whoever reads it next.
  (void)connection->WaitReadableOrInterrupt(deadline - Clock::Real()->Now());
  absl::MutexLock lock(&mutex_);
  sleeping_ = false;
}

std::optional<SendItem> SenderQueue::TakeItem(bool may_open) {
  std::shared_ptr<const ReadyEvent> awaited;
  {
    absl::MutexLock lock(&mutex_);
    for (size_t lanes = turns_.size(); lanes > 0; --lanes) {
      const SendItem& first = lanes_.at(turns_.front()).items.front();
      const auto* push = std::get_if<PushItem>(&first);
      if (push != nullptr && push->ready != nullptr && !push->ready->Ready()) {
        if (awaited == nullptr) awaited = push->ready;
      } else if (may_open || !std::holds_alternative<OpenItem>(first)) {
        return TakeFirst();
      }
      NextTurn();
    }
  }
  if (awaited != nullptr) awaited->WaitFor(kReadySlice);
  return std::nullopt;
}

SendItem SenderQueue::TakeFirst() {
  const TransferKey key = turns_.front();
  Lane& lane = lanes_.at(key);
  SendItem item = std::move(lane.items.front());
  lane.items.pop_front();
  if (auto* push = std::get_if<PushItem>(&item)) {
    JoinLayers(push, &lane.items);
    const size_t pieces =
        push->run.source_blocks.size() * static_cast<size_t>(push->run.layer_count);
    lane.credit -= static_cast<int64_t>(pieces * layer_bytes_);
  }
  if (lane.items.empty()) {
    DropLane(key);
  } else if (lane.credit <= 0) {
    // What it took too much it pays with its next turn.
    lane.credit += static_cast<int64_t>(frame_bytes_);
    NextTurn();
  }
  return item;
}

void SenderQueue::NextTurn() {
  turns_.push_back(turns_.front());
  turns_.pop_front();
}

void SenderQueue::JoinLayers(PushItem* push, std::deque<SendItem>* items) const {
  PushedRun& run = push->run;
  const size_t bytes = run.source_blocks.size() * layer_bytes_;
  while (!items->empty()) {
    const auto* next = std::get_if<PushItem>(&items->front());
    const auto layers = static_cast<size_t>(run.layer_count);
    if (next == nullptr || (layers + 1) * bytes > frame_bytes_ ||
        next->run.layer_begin != run.layer_begin + run.layer_count ||
        next->run.ordinal_begin != run.ordinal_begin ||
        next->run.source_blocks != run.source_blocks ||
        (next->ready != nullptr && !next->ready->Ready())) {
      return;
    }
    ++run.layer_count;
    items->pop_front();
  }
}

void SenderQueue::DropLane(const TransferKey& key) {
  if (lanes_.erase(key) > 0) std::erase(turns_, key);
}

void SenderQueue::Drop(const TransferKey& key) {
  absl::MutexLock lock(&mutex_);
  DropLane(key);
}

std::deque<TransferKey> SenderQueue::TakeAborts() {
  absl::MutexLock lock(&mutex_);
  return std::exchange(aborts_, {});
}

std::optional<KvSendTarget> SenderQueue::TakeOpen(const TransferKey& key) {
  absl::MutexLock lock(&mutex_);
  const auto it = lanes_.find(key);
  if (it == lanes_.end()) return std::nullopt;
  auto* open = std::get_if<OpenItem>(&it->second.items.front());
  if (open == nullptr) return std::nullopt;
  KvSendTarget target = std::move(open->target);
  DropLane(key);
  return target;
}

std::optional<std::string> SenderQueue::NextTransports() const {
  absl::MutexLock lock(&mutex_);
  for (const TransferKey& key : turns_) {
    const auto* open = std::get_if<OpenItem>(&lanes_.at(key).items.front());
    if (open != nullptr) return open->target.transport;
  }
  return std::nullopt;
}

std::vector<KvSendTarget> SenderQueue::TakeAllOpens() {
  absl::MutexLock lock(&mutex_);
  std::vector<KvSendTarget> targets;
  for (const TransferKey& key : turns_) {
    auto* open = std::get_if<OpenItem>(&lanes_.at(key).items.front());
    if (open != nullptr) targets.push_back(std::move(open->target));
  }
  lanes_.clear();
  turns_.clear();
  return targets;
}

}  // namespace tandem::kvtransfer
