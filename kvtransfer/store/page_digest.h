// The digest that travels with KV: a hash of each page, bound to the page's place, XORed.
//
// A page [block_size][head_dim] is the smallest thing that is ever shipped, so pages are hashed one
// by one: they are many, they may come in any order, and the digest of any range of heads is the
// XOR over those heads. The place (layer, key or value, head of the model) is mixed into each hash,
// so pages that were swapped do not cancel out. Against accidents, not against forgery.
//
// The hash is made to be as fast as memory in one pass with a copy, on a CPU and on a GPU: 32 lanes
// of 64 bits that depend on each other only in pairs, so a warp takes one page with a lane a
// thread. Version 1:
//   stripe s = bytes [256 s, 256 s + 256), the last one filled up with zeros;
//   x[l] = its little-endian word l; y[l] = x[l] XOR (key(l) + s * kStride)
//   acc[l] += low32(y[l]) * high32(y[l]) + x[l XOR 1]        (acc[l] begins as key(l))
// so that every bit of the page counts in two lanes, and differently in each stripe; then
//   f[j] = acc[j] XOR rotl(acc[j + 8], 13) XOR rotl(acc[j + 16], 29) XOR rotl(acc[j + 24], 47)
// for j in [0, 8), and, with Mix the finaliser of SplitMix64 (Steele, Lea, Flood 2014),
//   h = size XOR Mix(f[0] + kStride) XOR ... XOR Mix(f[7] + 8 * kStride)
//   digest = Mix(h XOR place * kStride), place = layer * 2^32 + head * 2 + (value ? 1 : 0).
// key(l) = Mix((l + 1) * kStride), kStride = 0x9e3779b97f4a7c15.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {

// Both ends must digest alike; told in the hello.
inline constexpr uint32_t kPageDigestVersion = 1;

uint64_t PageDigest(std::span<const std::byte> page, int layer, PageKind kind, int head);

// Whether what is copied stays in the cache of the CPU that copies it. Past the caches: for more
// bytes than they hold, where every write would first read what it overwrites. A caller that copied
// so must call FlushCopies() before it tells anybody that the bytes are there.
enum class CopyMode { kCached, kPastCaches };

// PageDigest() of `page`, which is copied to `to` in the same pass.
uint64_t CopyAndDigestPage(std::span<const std::byte> page, std::byte* to, CopyMode mode, int layer,
                           PageKind kind, int head);
void FlushCopies();

// XOR of them: the digest of a block from those of its pages.
inline uint64_t AllOf(std::span<const uint64_t> digests) {
  uint64_t all = 0;
  for (const uint64_t digest : digests) all ^= digest;
  return all;
}

}  // namespace tandem::kvtransfer
