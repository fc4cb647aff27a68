// Which blocks hold the KV of which token prefixes, so that a prompt's known beginning is not
// computed again. Not thread-safe: owned by the worker's loop, beside its BlockPool.
#pragma once

#include <span>
#include <vector>

#include "common/base/block_hash.h"
#include "engine/kv/block_pool.h"

namespace tandem {

// What changed since the last TakeEvents(), for the router's index.
struct BlockEvents {
  std::vector<Hash128> stored;
  std::vector<Hash128> removed;
  bool cleared = false;
};

class PrefixCache {
 public:
  // `pool` outlives the cache. Disabled: Match finds nothing and Insert keeps nothing.
  PrefixCache(BlockPool* pool, int block_size, bool enabled);
  ~PrefixCache();

  // The longest run of cached full blocks that begin `tokens` in the chain of `seed`, as a lease
  // that shares them. Each block's tokens are compared, so a colliding or forged hash never
  // matches. At most `max_blocks`.
  BlockLease Match(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks);
  // As Match, without taking references: how many blocks would match.
  int CountMatch(const Hash128& seed, std::span<const int32_t> tokens, int max_blocks) const;

  // Makes full, computed blocks of a sequence known: `lease` block i holds tokens [i * block_size,
  // (i + 1) * block_size) for every i < tokens.size() / block_size; blocks already known to the
  // cache are passed over quickly
  // (`from_block`: first that may be new). Exclusive blocks become shared; where another block with
  // the same content is cached already, this one stays exclusive to its lease.
  void Insert(const Hash128& seed, std::span<const int32_t> tokens, const BlockLease& lease,
              int from_block);

  // Forgets every unreferenced block.
  void Clear();
  BlockEvents TakeEvents();
  // All hashes now cached, for a router that has just connected.
  std::vector<Hash128> Snapshot() const;
  uint64_t query_tokens() const;
  uint64_t hit_tokens() const;
};

}  // namespace tandem
