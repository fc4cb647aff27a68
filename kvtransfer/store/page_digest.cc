#include "kvtransfer/store/page_digest.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kvtransfer/store/page_digest.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#ifndef TANDEM_KVTRANSFER_STORE_PAGE_DIGEST_COMMON_
#define TANDEM_KVTRANSFER_STORE_PAGE_DIGEST_COMMON_
namespace tandem::kvtransfer {

// Named, not unnamed: this file is compiled once for each instruction set, and these once in all.
namespace page_digest {

constexpr size_t kLanes = 32;
constexpr size_t kStripeBytes = kLanes * sizeof(uint64_t);
constexpr uint64_t kStride = 0x9e3779b97f4a7c15u;

constexpr uint64_t Mix(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
  return h ^ (h >> 31);
}

using LaneArray = std::array<uint64_t, kLanes>;

// kStream wants a target that is aligned to kStreamAlignment.
enum class Copying { kNot, kStore, kStream };
constexpr size_t kStreamAlignment = 64;

// A pool is mapped in pages of 4 KiB, at whose ends the hardware's prefetcher stops. Fetching so
// far ahead by hand, past the end of a page of KV too, reads memory half as fast again.
constexpr size_t kAheadBytes = 1024;
constexpr size_t kLineBytes = 64;

constexpr LaneArray MakeKeys() {
  LaneArray keys = {};
  for (size_t lane = 0; lane < kLanes; ++lane) keys[lane] = Mix((lane + 1) * kStride);
  return keys;
}
alignas(64) inline constexpr LaneArray kKeys = MakeKeys();

}  // namespace page_digest
}  // namespace tandem::kvtransfer
#endif  // TANDEM_KVTRANSFER_STORE_PAGE_DIGEST_COMMON_

HWY_BEFORE_NAMESPACE();
namespace tandem::kvtransfer {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;
namespace pd = page_digest;
using pd::Copying;

#if HWY_TARGET == HWY_SCALAR || HWY_TARGET == HWY_EMU128

// Without vectors: the definition as it stands.
template <Copying kCopy>
HWY_INLINE void TakePage(const std::byte* from, std::byte* to, size_t size, uint64_t* acc) {
  if (kCopy != Copying::kNot) std::memcpy(to, from, size);
  pd::LaneArray keys = pd::kKeys;
  std::memcpy(acc, keys.data(), sizeof(keys));
  for (size_t at = 0; at < size; at += pd::kStripeBytes) {
    pd::LaneArray x = {};
    std::memcpy(x.data(), from + at, std::min(pd::kStripeBytes, size - at));
    for (size_t lane = 0; lane < pd::kLanes; ++lane) {
      const uint64_t y = x[lane] ^ keys[lane];
      acc[lane] += (y & 0xffffffff) * (y >> 32) + x[lane ^ 1];
      keys[lane] += pd::kStride;
    }
  }
}

#else

using D = hn::CappedTag<uint64_t, 8>;
using V = hn::Vec<D>;
constexpr size_t kVectors = pd::kLanes / hn::MaxLanes(D());

// One stripe into the accumulators. `keys` are those of this stripe, and become the next one's.
template <Copying kCopy>
HWY_INLINE void TakeStripe(const std::byte* from, std::byte* to, V* acc, V* keys) {
  const D d;
  const hn::Repartition<uint32_t, D> d32;
  const size_t lanes = hn::Lanes(d);
  const V stride = hn::Set(d, pd::kStride);
  for (size_t v = 0; v < kVectors; ++v) {
    const size_t at = v * lanes * sizeof(uint64_t);
    const V x = hn::LoadU(d, reinterpret_cast<const uint64_t*>(from + at));
    if constexpr (kCopy != Copying::kNot) {
      auto* target = reinterpret_cast<uint64_t*>(to + at);
      if constexpr (kCopy == Copying::kStream) {
        hn::Stream(x, d, target);
      } else {
        hn::StoreU(x, d, target);
      }
    }
    const V y = hn::Xor(x, keys[v]);
    const V high = hn::ShiftRight<32>(y);
    const V product = hn::MulEven(hn::BitCast(d32, y), hn::BitCast(d32, high));
    acc[v] = hn::Add(acc[v], hn::Add(product, hn::Reverse2(d, x)));
    keys[v] = hn::Add(keys[v], stride);
  }
}

// The 32 lanes of all stripes of `size` bytes.
template <Copying kCopy>
HWY_INLINE void TakePage(const std::byte* from, std::byte* to, size_t size, uint64_t* lanes_out) {
  const D d;
  const size_t lanes = hn::Lanes(d);
  V acc[kVectors];
  V keys[kVectors];
  for (size_t v = 0; v < kVectors; ++v) {
    acc[v] = keys[v] = hn::Load(d, pd::kKeys.data() + v * lanes);
  }
  size_t at = 0;
  // As numbers, for these are addresses that no object need be at.
  const auto begin = reinterpret_cast<uintptr_t>(from);
  for (; at + pd::kStripeBytes <= size; at += pd::kStripeBytes) {
    for (size_t line = 0; line < pd::kStripeBytes; line += pd::kLineBytes) {
      hwy::Prefetch(reinterpret_cast<const std::byte*>(begin + at + pd::kAheadBytes + line));
    }
    TakeStripe<kCopy>(from + at, kCopy == Copying::kNot ? nullptr : to + at, acc, keys);
  }
  if (at < size) {
    std::byte rest[pd::kStripeBytes] = {};
    std::memcpy(rest, from + at, size - at);
    if (kCopy != Copying::kNot) std::memcpy(to + at, from + at, size - at);
    TakeStripe<Copying::kNot>(rest, rest, acc, keys);
  }
  for (size_t v = 0; v < kVectors; ++v) hn::StoreU(acc[v], d, lanes_out + v * lanes);
}

#endif

void DigestLanes(const std::byte* from, size_t size, uint64_t* lanes) {
  TakePage<Copying::kNot>(from, nullptr, size, lanes);
}
void CopyAndDigestLanes(const std::byte* from, std::byte* to, size_t size, bool stream,
                        uint64_t* lanes) {
  if (stream) {
    TakePage<Copying::kStream>(from, to, size, lanes);
  } else {
    TakePage<Copying::kStore>(from, to, size, lanes);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tandem::kvtransfer
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tandem::kvtransfer {
namespace {

HWY_EXPORT(DigestLanes);
HWY_EXPORT(CopyAndDigestLanes);

uint64_t Fold(const page_digest::LaneArray& acc, size_t size, int layer, PageKind kind, int head) {
  using page_digest::Mix;
  uint64_t h = size;
  for (size_t j = 0; j < 8; ++j) {
    const uint64_t f = acc[j] ^ std::rotl(acc[j + 8], 13) ^ std::rotl(acc[j + 16], 29) ^
                       std::rotl(acc[j + 24], 47);
    h ^= Mix(f + (j + 1) * page_digest::kStride);
  }
  const auto place = (static_cast<uint64_t>(layer) << 32) | (static_cast<uint64_t>(head) << 1) |
                     static_cast<uint64_t>(kind);
  return Mix(h ^ (place * page_digest::kStride));
}

}  // namespace

uint64_t PageDigest(std::span<const std::byte> page, int layer, PageKind kind, int head) {
  page_digest::LaneArray acc;
  HWY_DYNAMIC_DISPATCH(DigestLanes)(page.data(), page.size(), acc.data());
  return Fold(acc, page.size(), layer, kind, head);
}

uint64_t CopyAndDigestPage(std::span<const std::byte> page, std::byte* to, CopyMode mode, int layer,
                           PageKind kind, int head) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % page_digest::kStreamAlignment == 0;
  page_digest::LaneArray acc;
  HWY_DYNAMIC_DISPATCH(CopyAndDigestLanes)
  (page.data(), to, page.size(), mode == CopyMode::kPastCaches && aligned, acc.data());
  return Fold(acc, page.size(), layer, kind, head);
}

void FlushCopies() { hwy::FlushStream(); }

}  // namespace tandem::kvtransfer
#endif  // HWY_ONCE
