// Chained hashes that name token blocks, and with them prefixes.
//
// hash(block i) = XXH3-128(tokens of block i as little-endian int32, seeded by hash(block i - 1));
// the chain starts from a seed made of (cluster secret, model digest, cache_salt), so that equal
// prefixes have equal hashes only inside one cluster, model and salt. A hash is a hint: whoever
// finds a block by hash compares its tokens.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tandem {

struct Hash128 {
  uint64_t high = 0;
  uint64_t low = 0;

  bool operator==(const Hash128&) const = default;
  // 16 bytes, big-endian, as on the wire.
  std::string ToBytes() const;
  // False unless `bytes` has exactly 16 bytes.
  static bool FromBytes(std::string_view bytes, Hash128* out);
  // 32 lower-case hex digits.
  std::string ToHex() const;

  template <typename H>
  friend H AbslHashValue(H h, const Hash128& hash) {
    return H::combine(std::move(h), hash.high, hash.low);
  }
};

// XXH3-128 of bytes.
Hash128 HashBytes(std::string_view bytes);

// The chain's start for one (cluster secret, model digest, cache salt): an HMAC keyed by the
// secret, so that block hashes, which travel, tell nothing of it.
Hash128 BlockHashSeed(std::string_view cluster_secret, std::string_view model_digest,
                      std::string_view cache_salt);

// The hash of a full block that follows `parent`.
Hash128 ChainBlockHash(const Hash128& parent, std::span<const int32_t> block_tokens);

// Hashes of all full blocks of `tokens`; the rest beyond the last full block has none.
std::vector<Hash128> HashTokenBlocks(const Hash128& seed, std::span<const int32_t> tokens,
                                     int block_size);

}  // namespace tandem
