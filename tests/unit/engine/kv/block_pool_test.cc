#include "engine/kv/block_pool.h"

#include <set>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

BlockLease MustReserve(BlockPool& pool, int n) {
  absl::StatusOr<BlockLease> lease = pool.Reserve(n);
  EXPECT_OK(lease);
  return *std::move(lease);
}

TEST(BlockPool, HandsOutEachBlockOnceAndTakesItBack) {
  BlockPool pool(8);
  {
    BlockLease a = MustReserve(pool, 5);
    BlockLease b = MustReserve(pool, 3);
    std::set<int32_t> all(a.blocks().begin(), a.blocks().end());
    all.insert(b.blocks().begin(), b.blocks().end());
    EXPECT_EQ(all.size(), 8u);
    EXPECT_EQ(pool.NumAvailable(), 0);
    a.Release();
    EXPECT_TRUE(a.empty());
    EXPECT_EQ(pool.NumAvailable(), 5);
  }
  EXPECT_EQ(pool.counts(), (BlockPoolCounts{.total = 8, .free = 8}));
}

TEST(BlockPool, TooManyIsRefusedAndChangesNothing) {
  BlockPool pool(4);
  BlockLease a = MustReserve(pool, 3);
  const absl::StatusOr<BlockLease> b = pool.Reserve(2);
  EXPECT_EQ(b.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(b.status().message()), testing::HasSubstr("2 blocks asked for, 1"));
  EXPECT_EQ(pool.counts(), (BlockPoolCounts{.total = 4, .free = 1, .used = 3}));
  EXPECT_TRUE(MustReserve(pool, 0).empty());
}

TEST(BlockPool, GenerationGrowsWithEachUse) {
  BlockPool pool(1);
  int32_t block = MustReserve(pool, 1).blocks()[0];
  const uint64_t first = pool.generation(block);
  BlockLease again = MustReserve(pool, 1);
  EXPECT_EQ(again.blocks()[0], block);
  EXPECT_GT(pool.generation(block), first);
}

TEST(BlockPool, QuarantinedBlocksAreNotReusedUntilReleased) {
  BlockPool pool(4);
  const uint64_t ticket = pool.Quarantine(MustReserve(pool, 3));
  EXPECT_NE(ticket, 0u);
  EXPECT_EQ(pool.counts(), (BlockPoolCounts{.total = 4, .free = 1, .quarantined = 3}));
  EXPECT_FALSE(pool.Reserve(2).ok());
  pool.ReleaseQuarantine(ticket + 17);  // unknown: ignored
  pool.ReleaseQuarantine(ticket);
  EXPECT_EQ(pool.NumAvailable(), 4);
  pool.ReleaseQuarantine(ticket);  // twice: ignored
  EXPECT_EQ(pool.NumAvailable(), 4);
}

TEST(BlockLease, AppendAndSplitKeepOrder) {
  BlockPool pool(6);
  BlockLease a = MustReserve(pool, 2);
  BlockLease b = MustReserve(pool, 3);
  std::vector<int32_t> order(a.blocks().begin(), a.blocks().end());
  order.insert(order.end(), b.blocks().begin(), b.blocks().end());
  a.Append(std::move(b));
  EXPECT_THAT(std::vector<int32_t>(a.blocks().begin(), a.blocks().end()),
              testing::ElementsAreArray(order));
  BlockLease tail = a.SplitTail(4);
  EXPECT_EQ(tail.blocks()[0], order[4]);
  EXPECT_EQ(a.size(), 4);
  BlockLease moved = std::move(a);
  EXPECT_EQ(moved.size(), 4);
  moved = std::move(tail);  // what it held goes back
  EXPECT_EQ(pool.NumAvailable(), 5);
}

TEST(BlockPoolDeathTest, LeakedLeaseIsFatal) {
  EXPECT_DEATH(
      {
        BlockLease lease;
        BlockPool pool(2);
        lease = *pool.Reserve(1);
        pool.~BlockPool();
      },
      "still leased");
}

}  // namespace
}  // namespace tandem::engine
