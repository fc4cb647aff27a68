#include "kvtransfer/store/page_digest.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

#include "kvtransfer/store/kv_store.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

// The definition in page_digest.h, word by word.
uint64_t ByDefinition(std::vector<std::byte> page, uint64_t layer, PageKind kind, uint64_t head) {
  constexpr uint64_t kStride = 0x9e3779b97f4a7c15u;
  const auto mix = [](uint64_t h) {
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
    h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
    return h ^ (h >> 31);
  };
  const auto key = [&](uint64_t lane) { return mix((lane + 1) * kStride); };
  const size_t size = page.size();
  page.resize((size + 255) / 256 * 256);
  std::vector<uint64_t> acc(32);
  for (uint64_t lane = 0; lane < 32; ++lane) acc[lane] = key(lane);
  for (uint64_t stripe = 0; stripe < page.size() / 256; ++stripe) {
    std::vector<uint64_t> x(32);
    std::memcpy(x.data(), page.data() + 256 * stripe, 256);
    for (uint64_t lane = 0; lane < 32; ++lane) {
      const uint64_t y = x[lane] ^ (key(lane) + stripe * kStride);
      acc[lane] += (y & 0xffffffff) * (y >> 32) + x[lane ^ 1];
    }
  }
  uint64_t h = size;
  for (size_t j = 0; j < 8; ++j) {
    h ^= mix((acc[j] ^ std::rotl(acc[j + 8], 13) ^ std::rotl(acc[j + 16], 29) ^
              std::rotl(acc[j + 24], 47)) +
             (j + 1) * kStride);
  }
  const uint64_t place = (layer << 32) | (head << 1) | static_cast<uint64_t>(kind);
  return mix(h ^ (place * kStride));
}

TEST(PageDigest, EveryPlaceHasItsOwn) {
  const std::vector<std::byte> page(64);
  std::set<uint64_t> seen;
  for (int layer = 0; layer < 8; ++layer) {
    for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
      for (int head = 0; head < 8; ++head) seen.insert(PageDigest(page, layer, kind, head));
    }
  }
  EXPECT_EQ(seen.size(), 128u);
}

TEST(PageDigest, EveryFlippedBitChangesIt) {
  std::vector<std::byte> page(64);
  const uint64_t good = PageDigest(page, 1, PageKind::kKey, 2);
  for (size_t bit = 0; bit < 8 * page.size(); ++bit) {
    const auto mask = static_cast<std::byte>(1u << (bit % 8));
    page[bit / 8] ^= mask;
    EXPECT_NE(PageDigest(page, 1, PageKind::kKey, 2), good) << bit;
    page[bit / 8] ^= mask;
  }
}

// Written down once: another value would be another version.
TEST(PageDigest, IsWhatItsVersionSays) {
  std::vector<std::byte> page(4096 + 24);  // with a stripe that is not full
  for (size_t i = 0; i < page.size(); ++i) page[i] = static_cast<std::byte>(i * 7 + i / 256);
  EXPECT_EQ(PageDigest(page, 3, PageKind::kValue, 5), ByDefinition(page, 3, PageKind::kValue, 5));
  page.resize(8);
  EXPECT_EQ(PageDigest(page, 0, PageKind::kKey, 0), ByDefinition(page, 0, PageKind::kKey, 0));
}

TEST(PageDigest, IsTheSameWhereThePageIsCopied) {
  for (const CopyMode mode : {CopyMode::kCached, CopyMode::kPastCaches}) {
    for (const size_t size : {8, 256, 1000, 4096}) {
      std::vector<std::byte> page(size);
      for (size_t i = 0; i < size; ++i) page[i] = static_cast<std::byte>(i * 31);
      alignas(64) std::array<std::byte, 4096 + 1> copy;
      for (const size_t misaligned : {0, 1}) {
        copy.fill(std::byte{0});
        EXPECT_EQ(CopyAndDigestPage(page, copy.data() + misaligned, mode, 1, PageKind::kKey, 2),
                  PageDigest(page, 1, PageKind::kKey, 2));
        FlushCopies();
        EXPECT_TRUE(std::equal(page.begin(), page.end(), copy.begin() + misaligned));
      }
    }
  }
}

TEST(PageDigest, SwappedPartsOfAPageChangeIt) {
  std::vector<std::byte> page(2048);
  std::mt19937_64 random(4);
  for (std::byte& b : page) b = static_cast<std::byte>(random());
  const uint64_t good = PageDigest(page, 0, PageKind::kKey, 0);
  for (const size_t part : {8, 64, 256}) {
    for (size_t at = part; at < page.size(); at += part) {
      std::vector<std::byte> other = page;
      std::swap_ranges(other.begin(), other.begin() + static_cast<ptrdiff_t>(part),
                       other.begin() + static_cast<ptrdiff_t>(at));
      EXPECT_NE(PageDigest(other, 0, PageKind::kKey, 0), good) << part << " at " << at;
    }
  }
}

TEST(KvStore, ACopiedRunHasTheDigestOfBothPools) {
  TestPool source(SmallLayout(), 4);
  TestPool target(SmallLayout(), 6);
  source.FillRandom(8);
  const auto from = *MakeKvStore(source.region());
  const std::vector<int32_t> source_blocks = {3, 1};
  const std::vector<int32_t> target_blocks = {0, 5};
  const BlockRun run = {1, 2, {0, 2}, source_blocks, target_blocks};
  std::vector<uint64_t> digests(2, 0);
  int asked = 0;
  EXPECT_TRUE(from->CopyRun(run, ShapeOf(target.region()), target.region().base, CopyMode::kCached,
                            digests, [&] { return ++asked > 0; }));
  EXPECT_GT(asked, 0);
  EXPECT_EQ(digests, from->DigestRun(run));
  BlockRun arrived = run;
  arrived.source_blocks = target_blocks;
  EXPECT_EQ(digests, (*MakeKvStore(target.region()))->DigestRun(arrived));
  target.Fill(std::byte{0});
  EXPECT_FALSE(from->CopyRun(run, ShapeOf(target.region()), target.region().base, CopyMode::kCached,
                             digests, [] { return false; }));
  for (const std::byte b : target.memory()) ASSERT_EQ(b, std::byte{0});
}

TEST(KvStore, AGatheredRunIsWhatAPlanGathers) {
  TestPool pool({3, 4, 8, 16, DType::kFloat16}, 5);
  pool.FillRandom(9);
  const auto store = *MakeKvStore(pool.region());
  const std::vector<int32_t> blocks = {4, 0, 1};
  const BlockRun run = {1, 2, {1, 2}, blocks, blocks};
  uint64_t at = 0;
  std::vector<CopyPiece> plan = *BuildCopyPlan(store->shape(), store->shape(), run);
  for (CopyPiece& piece : plan) piece.target_offset = std::exchange(at, at + piece.bytes);
  ASSERT_EQ(at, run.Bytes(store->shape().layout));
  const auto wanted = store->AllocateStaging(at);
  store->Gather(plan, wanted.get());
  const auto got = store->AllocateStaging(at);
  std::vector<uint64_t> digests(blocks.size(), 0);
  store->GatherRun(run, got.get(), digests);
  EXPECT_TRUE(std::equal(got.get(), got.get() + at, wanted.get()));
  EXPECT_EQ(digests, store->DigestRun(run));
}

TEST(KvStore, TheDigestOfSomeHeadsIsWhatAPoolOfTheseHeadsHas) {
  const KvLayout whole_layout = {2, 4, 8, 16, DType::kFloat16};
  KvLayout half_layout = whole_layout;
  half_layout.num_kv_heads = 2;
  TestPool whole(whole_layout, 3);
  TestPool half(half_layout, 3, /*first_kv_head=*/2);
  whole.FillRandom(5);
  const auto from = *MakeKvStore(whole.region());
  const auto to = *MakeKvStore(half.region());
  const std::vector<int32_t> source = {1};
  const std::vector<int32_t> target = {2};
  const BlockRun run = {1, 1, {2, 2}, source, target};
  const auto plan = *BuildCopyPlan(from->shape(), to->shape(), run);
  from->Gather(plan, half.region().base);
  std::vector<uint64_t> sent(2), arrived(2);
  from->Digest({1, 1, {2, 2}, source, {}}, sent);
  to->Digest({1, 1, {2, 2}, target, {}}, arrived);
  EXPECT_EQ(sent, arrived);
  EXPECT_EQ(from->DigestRun(run), std::vector<uint64_t>{sent[0] ^ sent[1]});
}

TEST(KvStore, WhatAPoolCannotDoIsSaid) {
  EXPECT_EQ(MakeKvStore(KvRegion{}).status().code(), absl::StatusCode::kInvalidArgument);
  TestPool pool(SmallLayout(), 2);
  KvRegion region = pool.region();
  region.memory = KvMemoryKind::kDevice;
  EXPECT_FALSE(MakeKvStore(region).ok()) << "this is memory of the host";
  region = pool.region();
  region.fd = -1;
  EXPECT_EQ((*MakeKvStore(region))->Export().status().code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace tandem::kvtransfer
