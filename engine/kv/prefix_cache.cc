#include "engine/kv/prefix_cache.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"

namespace tandem::engine {

PrefixCache::PrefixCache(BlockPool* pool, int block_size, bool enabled, ChainHash hash)
    : pool_(pool), block_size_(block_size), enabled_(enabled), hash_(std::move(hash)) {
  TANDEM_CHECK(block_size > 0, "block size {}", block_size);
  TANDEM_CHECK(pool->cache_ == nullptr, "a pool has one prefix cache");
  pool_->cache_ = this;
  if (!enabled_) return;
  const size_t num_blocks = static_cast<size_t>(pool_->counts().total);
  entries_.resize(num_blocks);
  tokens_.resize(num_blocks * static_cast<size_t>(block_size_));
}

PrefixCache::~PrefixCache() {
  while (!by_hash_.empty()) Evict(by_hash_.begin()->second);
  pool_->cache_ = nullptr;
}

BlockLease PrefixCache::Match(const Hash128& seed, std::span<const int32_t> tokens,
                              int max_blocks) {
  query_tokens_ += tokens.size();
  return MatchMore(seed, tokens, 0, max_blocks);
}

BlockLease PrefixCache::MatchMore(const Hash128& seed, std::span<const int32_t> tokens, int held,
                                  int max_blocks) {
  std::vector<int32_t> blocks = FindChain(seed, tokens, max_blocks);
  blocks.erase(blocks.begin(),
               blocks.begin() + std::min(static_cast<ptrdiff_t>(held), std::ssize(blocks)));
  for (const int32_t block : blocks) pool_->AddReference(block);
  hit_tokens_ += blocks.size() * static_cast<uint64_t>(block_size_);
  return BlockLease(pool_, std::move(blocks));
}

int PrefixCache::CountMatch(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks,
                            int* num_idle) const {
  const std::vector<int32_t> blocks = FindChain(seed, tokens, max_blocks);
  if (num_idle != nullptr) {
    *num_idle = static_cast<int>(std::count_if(
        blocks.begin(), blocks.end(), [this](int32_t b) { return pool_->tree_.IsIdle(b); }));
  }
  return static_cast<int>(blocks.size());
}

std::vector<int32_t> PrefixCache::FindChain(const Hash128& seed, std::span<const int32_t> tokens,
                                            int max_blocks) const {
  std::vector<int32_t> blocks;
  if (!enabled_) return blocks;
  const int limit = std::min(max_blocks, static_cast<int>(tokens.size()) / block_size_);
  Hash128 hash = seed;
  CachedBlockId parent;
  for (int i = 0; i < limit; ++i) {
    const std::span<const int32_t> block_tokens = BlockTokens(tokens, i);
    hash = hash_(hash, block_tokens);
    const int32_t block = Find(hash, parent, block_tokens);
    if (block < 0) break;
    blocks.push_back(block);
    parent = pool_->tree_.Id(block);
  }
  return blocks;
}

void PrefixCache::Insert(const Hash128& seed, std::span<const int32_t> tokens,
                         const BlockLease& lease, int from_block) {
  if (!enabled_) return;
  const int end = static_cast<int>(tokens.size()) / block_size_;
  TANDEM_CHECK(lease.empty() || lease.pool_ == pool_, "lease of another pool");
  TANDEM_CHECK(end <= lease.size(), "{} full blocks of tokens but {} leased", end, lease.size());
  // Back to the last block before `from_block` whose content the cache still knows.
  int next = std::clamp(from_block, 0, end);
  CachedBlockId parent;
  while (next > 0 && !CachedContentOf(lease.blocks()[static_cast<size_t>(next - 1)], &parent)) {
    --next;
  }
  if (next == 0) parent = CachedBlockId{};
  Hash128 hash = next == 0 ? seed : entries_[static_cast<size_t>(parent.block)].hash;
  for (; next < end; ++next) {
    const int32_t block = lease.blocks()[static_cast<size_t>(next)];
    if (!InsertBlock(block, BlockTokens(tokens, next), &parent, &hash)) return;
  }
}

bool PrefixCache::CachedContentOf(int32_t block, CachedBlockId* id) const {
  const CachedBlockTree& tree = pool_->tree_;
  if (tree.Contains(block)) {
    *id = tree.Id(block);
    return !tree.IsOrphan(block);
  }
  const Entry& entry = entries_[static_cast<size_t>(block)];
  *id = entry.twin;
  return entry.generation == pool_->generation(block) && entry.twin.block >= 0 &&
         tree.Alive(entry.twin) && !tree.IsOrphan(entry.twin.block);
}

bool PrefixCache::InsertBlock(int32_t block, std::span<const int32_t> tokens, CachedBlockId* parent,
                              Hash128* hash) {
  CachedBlockTree& tree = pool_->tree_;
  Entry& entry = entries_[static_cast<size_t>(block)];
  *hash = hash_(*hash, tokens);
  const auto it = by_hash_.find(*hash);
  int32_t holder = it == by_hash_.end() ? -1 : it->second;
  if (tree.Contains(block)) {
    // Cached before; if its parent was evicted since, it continues the parent's successor.
    if (holder != block) return false;
    if (tree.IsOrphan(block)) tree.MoveUnder(block, *parent);
    if (tree.ParentOf(block) != *parent) return false;
    *parent = tree.Id(block);
    return true;
  }
  if (holder >= 0 && tree.IsOrphan(holder)) {
    Evict(holder);  // unreachable: its hash serves better here
    holder = -1;
  }
  if (holder >= 0) {
    if (!SameTokens(holder, tokens) || tree.ParentOf(holder) != *parent) return false;
    entry.twin = tree.Id(holder);
    entry.generation = pool_->generation(block);
    *parent = entry.twin;
    return true;
  }
  TANDEM_CHECK(pool_->blocks_[static_cast<size_t>(block)].state == BlockPool::Block::State::kUsed,
               "block {} is not leased", block);
  tree.Add(block, *parent);
  entry.hash = *hash;
  entry.twin = CachedBlockId{};
  std::copy(tokens.begin(), tokens.end(),
            tokens_.begin() + static_cast<ptrdiff_t>(block) * block_size_);
  by_hash_.emplace(*hash, block);
  NoteStored(*hash);
  *parent = tree.Id(block);
  return true;
}

int32_t PrefixCache::Find(const Hash128& hash, CachedBlockId parent,
                          std::span<const int32_t> tokens) const {
  const auto it = by_hash_.find(hash);
  if (it == by_hash_.end()) return -1;
  const int32_t block = it->second;
  return pool_->tree_.ParentOf(block) == parent && SameTokens(block, tokens) ? block : -1;
}

bool PrefixCache::SameTokens(int32_t block, std::span<const int32_t> tokens) const {
  return std::equal(tokens.begin(), tokens.end(),
                    tokens_.begin() + static_cast<ptrdiff_t>(block) * block_size_);
}

void PrefixCache::Evict(int32_t block) {
  TANDEM_CHECK(pool_->tree_.Contains(block), "block {} is not cached", block);
  const Hash128 hash = entries_[static_cast<size_t>(block)].hash;
  by_hash_.erase(hash);
  NoteRemoved(hash);
  pool_->tree_.Remove(block);
  pool_->OnUncached(block);
}

void PrefixCache::Clear() {
  for (int32_t block = pool_->tree_.Victim(); block >= 0; block = pool_->tree_.Victim()) {
    Evict(block);
  }
}

void PrefixCache::NoteStored(const Hash128& hash) {
  const auto [it, is_new] = pending_.emplace(hash, true);
  if (!is_new) pending_.erase(it);  // removed and stored again: no change
}

void PrefixCache::NoteRemoved(const Hash128& hash) {
  const auto [it, is_new] = pending_.emplace(hash, false);
  if (!is_new) pending_.erase(it);
}

BlockEvents PrefixCache::TakeEvents() {
  BlockEvents events;
  for (const auto& [hash, stored] : pending_) {
    (stored ? events.stored : events.removed).push_back(hash);
  }
  pending_.clear();
  return events;
}

std::vector<Hash128> PrefixCache::Snapshot() {
  pending_.clear();
  std::vector<Hash128> hashes;
  hashes.reserve(by_hash_.size());
  for (const auto& [hash, block] : by_hash_) hashes.push_back(hash);
  return hashes;
}

}  // namespace tandem::engine
