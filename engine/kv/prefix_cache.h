// Which blocks hold the KV of which token prefixes, so that a prompt's known beginning is not
// computed again. Not thread-safe: owned by the worker's loop, beside its BlockPool.
//
// A hash only finds a candidate. A block serves a prompt if its tokens are the prompt's and its
// parent is the very block that served the tokens before; so a colliding or forged hash costs a
// recompute, never a wrong answer.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "common/base/block_hash.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/cached_block_tree.h"

namespace tandem::engine {

// Net changes since the last TakeEvents(), for the router's index: a hash stands in one list at
// most.
struct BlockEvents {
  std::vector<Hash128> stored;
  std::vector<Hash128> removed;
};

// What was found of a prompt that waits, kept between looks: looking again costs little.
struct PromptMatch {
  std::vector<CachedBlockId> chain;
  int num_idle = 0;
  uint64_t version = 0;  // of the cache, which has not changed if it is the same
};

class PrefixCache : private Evictor {
 public:
  // The hash of a full block that follows `parent`; other than ChainBlockHash in tests only.
  using ChainHash = std::function<Hash128(const Hash128& parent, std::span<const int32_t> tokens)>;

  // `pool` outlives the cache and has no other evictor. Disabled: Match finds nothing and Insert
  // keeps nothing.
  PrefixCache(BlockPool* pool, int block_size, bool enabled, ChainHash hash = ChainBlockHash);
  ~PrefixCache() override;
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // The longest run of cached full blocks that begin `tokens` in the chain of `seed`, as a lease
  // that shares them. At most `max_blocks`.
  BlockLease Match(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks);
  // For a prompt that Match served with the first `held` blocks of `lease`, later: the blocks after
  // those that have been cached since. Query tokens are not counted again.
  BlockLease MatchMore(const Hash128& seed, std::span<const int32_t> tokens,
                       const BlockLease& lease, int held, int max_blocks);
  // As Match, without taking references: how many blocks would match. `num_idle`, if given: how
  // many of those no lease holds, so that matching them takes them from NumAvailable().
  int CountMatch(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks,
                 int* num_idle = nullptr) const;
  // The same for a prompt that was looked at before: `known` is what that found, at first nothing,
  // and is brought up to date. No token is hashed twice.
  int CountMatch(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks,
                 PromptMatch* known) const;

  // Makes full, computed blocks of a sequence known: `lease` block i holds tokens [i * block_size,
  // (i + 1) * block_size) for every i < tokens.size() / block_size. `from_block`: blocks before it
  // were given to Insert or came from Match already (a hint: they are revisited where the chain
  // needs it; 0 once at a sequence's end also repairs what evictions took out of its middle).
  // Exclusive blocks become shared; where another block with the same content is cached already,
  // this one stays exclusive to its lease. Blocks after a hash collision are not kept.
  void Insert(const Hash128& seed, std::span<const int32_t> tokens, const BlockLease& lease,
              int from_block);

  // Whether numbers are broken shows in the logits behind them, which may come later, or never.
  // These were sound: the cached blocks of `lease` are proven.
  void Prove(const BlockLease& lease);
  // They were broken, or nobody will know: forgets the cached blocks of `lease` that are not
  // proven. Returns them; other leases may hold them still.
  std::vector<int32_t> Retract(const BlockLease& lease);

  // From now on the digest of a block's bytes is taken when it is inserted, that is when it was
  // computed, and compared before it serves a prompt: a block that was damaged in between is
  // forgotten instead. The cache must be empty. Null: no longer.
  using BlockDigests = std::function<std::vector<uint64_t>(std::span<const int32_t> blocks)>;
  void KeepDigests(BlockDigests digests);
  uint64_t damaged_blocks() const { return damaged_blocks_; }

  // Forgets every unreferenced block.
  void Clear();
  BlockEvents TakeEvents();
  // All hashes now cached, for a router that has just connected. Also drops pending events, which
  // the snapshot contains.
  std::vector<Hash128> Snapshot();
  uint64_t query_tokens() const { return query_tokens_; }
  uint64_t hit_tokens() const { return hit_tokens_; }
  int block_size() const { return block_size_; }
  bool enabled() const { return enabled_; }

 private:
  // What a block knows of the cached content that equals its own.
  struct Entry {
    Hash128 hash;         // of a cached block
    uint64_t digest = 0;  // of its bytes, where digests are kept
    bool proven = false;  // of a cached block
    CachedBlockId twin;   // of a block that is not cached: the cached block with the same content
    uint64_t generation = 0;  // of the block when `twin` was noted
  };
  // How far a prompt was followed: the last cached block, and the hash that the next one chains on.
  struct ChainEnd {
    CachedBlockId block;
    Hash128 hash;
  };

  bool OnIdle(int32_t block, uint64_t stamp) override;
  int32_t Evict() override;
  // Removes a block from the cache, not from the pool.
  void Forget(int32_t block);
  // Removes a block from the cache; it becomes free unless leases hold it.
  void Drop(int32_t block);

  // Appends to `chain`, which serves blocks up to `from` of `tokens` and ends there (empty: with
  // `parent`), the cached blocks that go on, up to block `max_blocks`.
  void Follow(const Hash128& seed, std::span<const int32_t> tokens, int from, CachedBlockId parent,
              int max_blocks, std::vector<CachedBlockId>* chain) const;
  // References to the undamaged ones of a chain that was just found.
  BlockLease Take(const std::vector<CachedBlockId>& chain);
  // The cached block that continues `parent` with `tokens` under `hash`; -1: none.
  int32_t Find(const Hash128& hash, CachedBlockId parent, std::span<const int32_t> tokens) const;
  bool SameTokens(int32_t block, std::span<const int32_t> tokens) const;
  // The reachable cached block that has the content of `block`, a leased and computed one.
  std::optional<CachedBlockId> CachedContentOf(int32_t block) const;
  // Makes `block`, which holds `tokens`, known as the continuation of `chain`; notes it in `added`
  // if it was not. Returns the end of the longer chain; nothing if what is cached there has other
  // content, so that no prompt could reach what follows.
  std::optional<ChainEnd> InsertBlock(const ChainEnd& chain, int32_t block,
                                      std::span<const int32_t> tokens, std::vector<int32_t>* added);
  // Takes the digests of blocks that were just inserted.
  void TakeDigests(std::span<const int32_t> blocks);
  // How many of `blocks`, a chain, are as they were inserted; the first that is not is forgotten.
  size_t CountUndamaged(std::span<const int32_t> blocks);
  void NoteStored(const Hash128& hash);
  void NoteRemoved(const Hash128& hash);
  std::span<const int32_t> BlockTokens(std::span<const int32_t> tokens, int i) const {
    return tokens.subspan(static_cast<size_t>(i) * static_cast<size_t>(block_size_),
                          static_cast<size_t>(block_size_));
  }

  BlockPool* const pool_;
  const int block_size_;
  const bool enabled_;
  const ChainHash hash_;
  CachedBlockTree tree_;
  std::vector<Entry> entries_;   // by block
  std::vector<int32_t> tokens_;  // [block][block_size] of cached blocks
  absl::flat_hash_map<Hash128, int32_t> by_hash_;
  absl::flat_hash_map<Hash128, bool> pending_;  // true: stored, false: removed
  BlockDigests digests_;
  uint64_t version_ = 1;  // grows with every change of what a look would find
  uint64_t query_tokens_ = 0;
  uint64_t hit_tokens_ = 0;
  uint64_t damaged_blocks_ = 0;
};

}  // namespace tandem::engine
