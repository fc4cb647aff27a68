#include "common/base/block_hash.h"

#include <array>
#include <bit>
#include <cstring>

#include "fmt/format.h"
#include "xxhash.h"

#include "common/base/hmac.h"

namespace tandem {
namespace {

static_assert(std::endian::native == std::endian::little,
              "token bytes are hashed as they lie in memory");

Hash128 FromXxh(XXH128_hash_t hash) { return Hash128{hash.high64, hash.low64}; }

}  // namespace

std::string Hash128::ToBytes() const {
  std::string bytes(16, '\0');
  for (int i = 0; i < 8; ++i) {
    bytes[i] = static_cast<char>(high >> (56 - 8 * i));
    bytes[8 + i] = static_cast<char>(low >> (56 - 8 * i));
  }
  return bytes;
}

bool Hash128::FromBytes(std::string_view bytes, Hash128* out) {
  if (bytes.size() != 16) return false;
  *out = Hash128{};
  for (int i = 0; i < 8; ++i) {
    out->high = out->high << 8 | static_cast<uint8_t>(bytes[i]);
    out->low = out->low << 8 | static_cast<uint8_t>(bytes[8 + i]);
  }
  return true;
}

std::string Hash128::ToHex() const { return fmt::format("{:016x}{:016x}", high, low); }

Hash128 HashBytes(std::string_view bytes) {
  return FromXxh(XXH3_128bits(bytes.data(), bytes.size()));
}

Hash128 BlockHashSeed(std::string_view cluster_secret, std::string_view model_digest,
                      std::string_view cache_salt) {
  std::string message;
  for (const std::string_view part :
       {std::string_view("tandem 1 block hash"), model_digest, cache_salt}) {
    AppendWithLength(part, &message);
  }
  Hash128 seed;
  Hash128::FromBytes(std::string_view(HmacSha256(cluster_secret, message)).substr(0, 16), &seed);
  return seed;
}

Hash128 ChainBlockHash(const Hash128& parent, std::span<const int32_t> block_tokens) {
  // In one piece: 10 ns for 16 tokens, where the streaming interface takes 28.
  constexpr size_t kParentBytes = 16;
  std::array<char, kParentBytes + 256 * sizeof(int32_t)> on_stack;  // the largest block there is
  std::vector<char> on_heap;
  char* bytes = on_stack.data();
  const size_t size = kParentBytes + block_tokens.size_bytes();
  if (size > on_stack.size()) {
    on_heap.resize(size);
    bytes = on_heap.data();
  }
  std::memcpy(bytes, &parent.high, sizeof(parent.high));
  std::memcpy(bytes + sizeof(parent.high), &parent.low, sizeof(parent.low));
  std::memcpy(bytes + kParentBytes, block_tokens.data(), block_tokens.size_bytes());
  return FromXxh(XXH3_128bits(bytes, size));
}

std::vector<Hash128> HashTokenBlocks(const Hash128& seed, std::span<const int32_t> tokens,
                                     int block_size) {
  std::vector<Hash128> hashes;
  hashes.reserve(tokens.size() / block_size);
  Hash128 parent = seed;
  for (size_t begin = 0; begin + block_size <= tokens.size(); begin += block_size) {
    parent = ChainBlockHash(parent, tokens.subspan(begin, block_size));
    hashes.push_back(parent);
  }
  return hashes;
}

}  // namespace tandem
