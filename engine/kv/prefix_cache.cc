#include "engine/kv/prefix_cache.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"

namespace tandem::engine {

PrefixCache::PrefixCache(BlockPool* pool, int block_size, bool enabled, ChainHash hash)
    : pool_(pool),
      block_size_(block_size),
      enabled_(enabled),
      hash_(std::move(hash)),
      tree_(enabled ? pool->counts().total : 0) {
  TANDEM_CHECK(block_size > 0, "block size {}", block_size);
  pool_->SetEvictor(this);
  if (!enabled_) return;
  const size_t num_blocks = static_cast<size_t>(pool_->counts().total);
  entries_.resize(num_blocks);
  tokens_.resize(num_blocks * static_cast<size_t>(block_size_));
}

PrefixCache::~PrefixCache() {
  while (!by_hash_.empty()) Drop(by_hash_.begin()->second);
  pool_->SetEvictor(nullptr);
}

BlockLease PrefixCache::Match(const Hash128& seed, std::span<const int32_t> tokens,
                              int max_blocks) {
  query_tokens_ += tokens.size();
  std::vector<CachedBlockId> chain;
  Follow(seed, tokens, 0, CachedBlockId{}, max_blocks, &chain);
  return Take(chain);
}

BlockLease PrefixCache::MatchMore(const Hash128& seed, std::span<const int32_t> tokens,
                                  const BlockLease& lease, int held, int max_blocks) {
  std::vector<CachedBlockId> chain;
  if (!enabled_) return BlockLease();
  std::optional<CachedBlockId> parent = CachedBlockId{};
  if (held > 0) parent = CachedContentOf(lease.blocks()[static_cast<size_t>(held - 1)]);
  if (parent.has_value()) Follow(seed, tokens, held, *parent, max_blocks, &chain);
  return Take(chain);
}

BlockLease PrefixCache::Take(const std::vector<CachedBlockId>& chain) {
  std::vector<int32_t> blocks;
  blocks.reserve(chain.size());
  for (const CachedBlockId& id : chain) blocks.push_back(id.block);
  blocks.resize(CountUndamaged(blocks));
  for (const int32_t block : blocks) {
    if (!tree_.IsIdle(block)) continue;
    tree_.SetInUse(block);
    ++version_;
  }
  hit_tokens_ += blocks.size() * static_cast<uint64_t>(block_size_);
  return pool_->Share(std::move(blocks));
}

int PrefixCache::CountMatch(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks,
                            int* num_idle) const {
  PromptMatch match;
  const int count = CountMatch(seed, tokens, max_blocks, &match);
  if (num_idle != nullptr) *num_idle = match.num_idle;
  return count;
}

int PrefixCache::CountMatch(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks,
                            PromptMatch* known) const {
  std::vector<CachedBlockId>& chain = known->chain;
  if (std::exchange(known->version, version_) == version_) return static_cast<int>(chain.size());
  const auto gone = [this](const CachedBlockId& id) { return !tree_.Alive(id); };
  chain.erase(std::find_if(chain.begin(), chain.end(), gone), chain.end());
  Follow(seed, tokens, static_cast<int>(chain.size()), CachedBlockId{}, max_blocks, &chain);
  const auto idle = [this](const CachedBlockId& id) { return tree_.IsIdle(id.block); };
  known->num_idle = static_cast<int>(std::count_if(chain.begin(), chain.end(), idle));
  return static_cast<int>(chain.size());
}

void PrefixCache::Follow(const Hash128& seed, std::span<const int32_t> tokens, int from,
                         CachedBlockId parent, int max_blocks,
                         std::vector<CachedBlockId>* chain) const {
  if (!enabled_) return;
  if (!chain->empty()) parent = chain->back();
  const int limit = std::min(max_blocks, static_cast<int>(tokens.size()) / block_size_);
  for (int i = from; i < limit; ++i) {
    const std::span<const int32_t> block_tokens = BlockTokens(tokens, i);
    const Hash128& before =
        parent.block < 0 ? seed : entries_[static_cast<size_t>(parent.block)].hash;
    const int32_t block = Find(hash_(before, block_tokens), parent, block_tokens);
    if (block < 0) return;
    parent = tree_.Id(block);
    chain->push_back(parent);
  }
}

void PrefixCache::Insert(const Hash128& seed, std::span<const int32_t> tokens,
                         const BlockLease& lease, int from_block) {
  if (!enabled_) return;
  const int end = static_cast<int>(tokens.size()) / block_size_;
  TANDEM_CHECK(lease.empty() || lease.pool() == pool_, "lease of another pool");
  TANDEM_CHECK(end <= lease.size(), "{} full blocks of tokens but {} leased", end, lease.size());
  // A block can only be found through its parents, and those before `from_block` may have been
  // evicted since they were inserted (a twin is not leased by this sequence). So the walk begins
  // behind the last block whose content is still cached and reachable, and puts back what is
  // missing between it and `from_block`.
  int next = std::clamp(from_block, 0, end);
  std::optional<ChainEnd> chain;
  for (; next > 0; --next) {
    const auto known = CachedContentOf(lease.blocks()[static_cast<size_t>(next - 1)]);
    if (!known.has_value()) continue;
    chain = ChainEnd{*known, entries_[static_cast<size_t>(known->block)].hash};
    break;
  }
  if (!chain.has_value()) chain = ChainEnd{CachedBlockId{}, seed};
  std::vector<int32_t> added;
  for (; next < end && chain.has_value(); ++next) {
    chain = InsertBlock(*chain, lease.blocks()[static_cast<size_t>(next)],
                        BlockTokens(tokens, next), &added);
  }
  TakeDigests(added);
}

void PrefixCache::Prove(const BlockLease& lease) {
  if (!enabled_) return;
  for (const int32_t block : lease.blocks()) entries_[static_cast<size_t>(block)].proven = true;
}

std::vector<int32_t> PrefixCache::Retract(const BlockLease& lease) {
  std::vector<int32_t> retracted;
  if (!enabled_) return retracted;
  for (const int32_t block : lease.blocks()) {
    if (!tree_.Contains(block) || entries_[static_cast<size_t>(block)].proven) continue;
    Drop(block);
    retracted.push_back(block);
  }
  return retracted;
}

void PrefixCache::KeepDigests(BlockDigests digests) {
  TANDEM_CHECK(digests == nullptr || by_hash_.empty(), "{} blocks are cached without a digest",
               by_hash_.size());
  digests_ = std::move(digests);
}

void PrefixCache::TakeDigests(std::span<const int32_t> blocks) {
  if (digests_ == nullptr || blocks.empty()) return;
  const std::vector<uint64_t> digests = digests_(blocks);
  for (size_t i = 0; i < blocks.size(); ++i) {
    entries_[static_cast<size_t>(blocks[i])].digest = digests[i];
  }
}

size_t PrefixCache::CountUndamaged(std::span<const int32_t> blocks) {
  if (digests_ == nullptr || blocks.empty()) return blocks.size();
  const std::vector<uint64_t> digests = digests_(blocks);
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (entries_[static_cast<size_t>(blocks[i])].digest == digests[i]) continue;
    ++damaged_blocks_;
    Drop(blocks[i]);
    return i;
  }
  return blocks.size();
}

std::optional<CachedBlockId> PrefixCache::CachedContentOf(int32_t block) const {
  if (tree_.Contains(block)) {
    if (tree_.IsOrphan(block)) return std::nullopt;
    return tree_.Id(block);
  }
  // The note about the twin is only good for the block's present content (generation) and for the
  // twin's present stay in the cache.
  const Entry& entry = entries_[static_cast<size_t>(block)];
  const bool noted = entry.twin.block >= 0 && entry.generation == pool_->generation(block);
  if (!noted || !tree_.Alive(entry.twin) || tree_.IsOrphan(entry.twin.block)) return std::nullopt;
  return entry.twin;
}

std::optional<PrefixCache::ChainEnd> PrefixCache::InsertBlock(const ChainEnd& chain, int32_t block,
                                                              std::span<const int32_t> tokens,
                                                              std::vector<int32_t>* added) {
  const Hash128 hash = hash_(chain.hash, tokens);
  const auto it = by_hash_.find(hash);
  int32_t holder = it == by_hash_.end() ? -1 : it->second;
  if (tree_.Contains(block)) {
    // This very block was cached before. Where its parent was evicted meanwhile, it continues the
    // block that took the parent's place.
    if (holder != block) return std::nullopt;
    if (tree_.IsOrphan(block)) {
      tree_.MoveUnder(block, chain.block);
      ++version_;
    }
    if (tree_.ParentOf(block) != chain.block) return std::nullopt;
    return ChainEnd{tree_.Id(block), hash};
  }
  if (holder >= 0 && tree_.IsOrphan(holder)) {
    Drop(holder);  // no prompt can reach it, and the hash can serve only one block
    holder = -1;
  }
  Entry& entry = entries_[static_cast<size_t>(block)];
  if (holder >= 0) {
    // Another block has this content: it serves, and this one stays the lease's own. Any other
    // content under the same hash is a collision.
    if (!SameTokens(holder, tokens) || tree_.ParentOf(holder) != chain.block) return std::nullopt;
    entry.twin = tree_.Id(holder);
    entry.generation = pool_->generation(block);
    return ChainEnd{entry.twin, hash};
  }
  pool_->Keep(block);
  tree_.Add(block, chain.block);
  entry.hash = hash;
  entry.twin = CachedBlockId{};
  entry.proven = false;
  std::copy(tokens.begin(), tokens.end(),
            tokens_.begin() + static_cast<ptrdiff_t>(block) * block_size_);
  by_hash_.emplace(hash, block);
  ++version_;
  added->push_back(block);
  NoteStored(hash);
  return ChainEnd{tree_.Id(block), hash};
}

int32_t PrefixCache::Find(const Hash128& hash, CachedBlockId parent,
                          std::span<const int32_t> tokens) const {
  const auto it = by_hash_.find(hash);
  if (it == by_hash_.end()) return -1;
  const int32_t block = it->second;
  return tree_.ParentOf(block) == parent && SameTokens(block, tokens) ? block : -1;
}

bool PrefixCache::SameTokens(int32_t block, std::span<const int32_t> tokens) const {
  return std::equal(tokens.begin(), tokens.end(),
                    tokens_.begin() + static_cast<ptrdiff_t>(block) * block_size_);
}

bool PrefixCache::OnIdle(int32_t block, uint64_t stamp) {
  if (tree_.IsOrphan(block)) {
    Forget(block);  // no prompt can reach it: as a free block it is worth more
    return false;
  }
  tree_.SetIdle(block, stamp);
  ++version_;
  return true;
}

int32_t PrefixCache::Evict() {
  const int32_t victim = tree_.Victim();
  TANDEM_CHECK(victim >= 0, "nothing idle is cached");
  Forget(victim);
  return victim;
}

void PrefixCache::Forget(int32_t block) {
  TANDEM_CHECK(tree_.Contains(block), "block {} is not cached", block);
  const Hash128 hash = entries_[static_cast<size_t>(block)].hash;
  by_hash_.erase(hash);
  NoteRemoved(hash);
  tree_.Remove(block);
  ++version_;
}

void PrefixCache::Drop(int32_t block) {
  Forget(block);
  pool_->Unkeep(block);
}

void PrefixCache::Clear() {
  for (int32_t block = tree_.Victim(); block >= 0; block = tree_.Victim()) Drop(block);
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
