#include "engine/kv/block_pool.h"

#include <algorithm>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::engine {

BlockLease::BlockLease(BlockLease&& other) noexcept
    : pool_(std::exchange(other.pool_, nullptr)), blocks_(std::move(other.blocks_)) {
  other.blocks_.clear();
}

BlockLease& BlockLease::operator=(BlockLease&& other) noexcept {
  if (this != &other) {
    Release();
    pool_ = std::exchange(other.pool_, nullptr);
    blocks_ = std::move(other.blocks_);
    other.blocks_.clear();
  }
  return *this;
}

BlockLease::~BlockLease() { Release(); }

void BlockLease::Append(BlockLease other) {
  if (other.empty()) return;
  TANDEM_CHECK(pool_ == nullptr || pool_ == other.pool_, "leases of two pools");
  pool_ = other.pool_;
  blocks_.insert(blocks_.end(), other.blocks_.begin(), other.blocks_.end());
  other.blocks_.clear();
}

BlockLease BlockLease::SplitTail(int from) {
  TANDEM_CHECK(from >= 0 && from <= size(), "split at {} of {} blocks", from, size());
  BlockLease tail(pool_, std::vector<int32_t>(blocks_.begin() + from, blocks_.end()));
  blocks_.resize(static_cast<size_t>(from));
  return tail;
}

void BlockLease::Release() {
  if (pool_ != nullptr) pool_->ReleaseAll(blocks_);
  blocks_.clear();
}

BlockPool::BlockPool(int num_blocks) : blocks_(static_cast<size_t>(num_blocks)) {
  // Low block numbers are handed out first.
  for (int32_t block = num_blocks - 1; block >= 0; --block) PushFree(block);
}

BlockPool::~BlockPool() {
  TANDEM_CHECK(num_used_ == 0, "{} blocks are still leased when their pool ends", num_used_);
}

absl::StatusOr<BlockLease> BlockPool::Reserve(int num_blocks) {
  TANDEM_CHECK(num_blocks >= 0, "cannot reserve {} blocks", num_blocks);
  if (num_blocks > NumAvailable()) {
    return ResourceExhausted(
        "KV pool: {} blocks asked for, {} available of {} (raise --kv-cache-memory-bytes or retry "
        "when requests have ended)",
        num_blocks, NumAvailable(), blocks_.size());
  }
  std::vector<int32_t> taken;
  taken.reserve(static_cast<size_t>(num_blocks));
  while (static_cast<int>(taken.size()) < num_blocks) {
    if (num_free_ == 0) {
      // NumAvailable() counted idle blocks, so there is one to give up.
      const int32_t victim = evictor_->Evict();
      Block& block = blocks_[Index(victim)];
      TANDEM_CHECK(block.state == Block::State::kIdle, "block {} was evicted in use", victim);
      block.kept = false;
      --num_idle_;
      PushFree(victim);
    }
    const int32_t id = PopFree();
    Block& block = blocks_[Index(id)];
    block.state = Block::State::kUsed;
    block.references = 1;
    ++block.generation;
    ++num_used_;
    taken.push_back(id);
  }
  return BlockLease(this, std::move(taken));
}

BlockPoolCounts BlockPool::counts() const {
  return {.total = static_cast<int>(blocks_.size()),
          .free = num_free_,
          .cached = num_idle_,
          .used = num_used_,
          .quarantined = num_quarantined_};
}

uint64_t BlockPool::Quarantine(BlockLease lease) {
  const uint64_t ticket = ++last_ticket_;
  const uint64_t stamp = ++release_stamp_;
  std::vector<int32_t> held;
  const std::vector<int32_t> all = std::exchange(lease.blocks_, {});
  for (auto it = all.rbegin(); it != all.rend(); ++it) {
    Block& block = blocks_[Index(*it)];
    // A block that others read, or may come to read through the cache, was sealed before: its
    // remote writer is done with it.
    if (block.kept || block.references > 1) {
      DropReference(*it, stamp);
      continue;
    }
    TANDEM_CHECK(block.state == Block::State::kUsed, "block {} is not in use", *it);
    block.state = Block::State::kQuarantined;
    block.references = 0;
    --num_used_;
    ++num_quarantined_;
    held.push_back(*it);
  }
  if (!held.empty()) quarantine_.emplace(ticket, std::move(held));
  return ticket;
}

void BlockPool::ReleaseQuarantine(uint64_t ticket) {
  const auto it = quarantine_.find(ticket);
  if (it == quarantine_.end()) return;
  for (const int32_t block : it->second) {
    TANDEM_CHECK(blocks_[Index(block)].state == Block::State::kQuarantined,
                 "block {} left quarantine early", block);
    --num_quarantined_;
    PushFree(block);
  }
  quarantine_.erase(it);
}

size_t BlockPool::Index(int32_t block) const {
  TANDEM_CHECK(block >= 0 && static_cast<size_t>(block) < blocks_.size(), "no block {}", block);
  return static_cast<size_t>(block);
}

int32_t BlockPool::PopFree() {
  TANDEM_CHECK(free_head_ >= 0, "free list is empty");
  const int32_t id = free_head_;
  free_head_ = blocks_[Index(id)].next_free;
  --num_free_;
  return id;
}

void BlockPool::PushFree(int32_t id) {
  Block& block = blocks_[Index(id)];
  TANDEM_CHECK(block.references == 0, "block {} is still referenced", id);
  block.state = Block::State::kFree;
  block.next_free = free_head_;
  free_head_ = id;
  ++num_free_;
}

void BlockPool::ReleaseAll(std::span<const int32_t> blocks) {
  const uint64_t stamp = ++release_stamp_;
  // From the tail, so that children become idle before their parents.
  for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) DropReference(*it, stamp);
}

void BlockPool::DropReference(int32_t id, uint64_t stamp) {
  Block& block = blocks_[Index(id)];
  TANDEM_CHECK(block.state == Block::State::kUsed && block.references > 0,
               "block {} is released twice", id);
  if (--block.references > 0) return;
  --num_used_;
  if (block.kept && evictor_->OnIdle(id, stamp)) {
    block.state = Block::State::kIdle;
    ++num_idle_;
    return;
  }
  block.kept = false;
  PushFree(id);
}

void BlockPool::SetEvictor(Evictor* evictor) {
  TANDEM_CHECK(evictor == nullptr || evictor_ == nullptr, "a pool has one evictor");
  TANDEM_CHECK(num_idle_ == 0, "{} blocks are still kept for the evictor that leaves", num_idle_);
  evictor_ = evictor;
}

void BlockPool::Keep(int32_t id) {
  Block& block = blocks_[Index(id)];
  TANDEM_CHECK(block.state == Block::State::kUsed, "block {} is not leased", id);
  block.kept = true;
}

void BlockPool::Unkeep(int32_t id) {
  Block& block = blocks_[Index(id)];
  TANDEM_CHECK(block.kept, "block {} is not kept", id);
  block.kept = false;
  if (block.state != Block::State::kIdle) return;
  --num_idle_;
  PushFree(id);
}

BlockLease BlockPool::Share(std::vector<int32_t> blocks) {
  for (const int32_t id : blocks) {
    Block& block = blocks_[Index(id)];
    TANDEM_CHECK(block.kept, "block {} is not kept", id);
    if (block.references++ > 0) continue;
    block.state = Block::State::kUsed;
    --num_idle_;
    ++num_used_;
  }
  return BlockLease(this, std::move(blocks));
}

}  // namespace tandem::engine
