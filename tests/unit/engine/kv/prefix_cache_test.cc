#include "engine/kv/prefix_cache.h"

#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

constexpr int kBlock = 16;
constexpr int kMany = 1 << 20;

std::vector<int32_t> Tokens(int n, int first = 0) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::vector<int32_t> Blocks(const BlockLease& lease) {
  return {lease.blocks().begin(), lease.blocks().end()};
}

class PrefixCacheTest : public testing::Test {
 protected:
  // Reserves, "computes" and caches a prompt.
  BlockLease Compute(const std::vector<int32_t>& tokens) {
    const int blocks = (static_cast<int>(tokens.size()) + kBlock - 1) / kBlock;
    BlockLease lease = cache_.Match(seed_, tokens, (static_cast<int>(tokens.size()) - 1) / kBlock);
    const int matched = lease.size();
    absl::StatusOr<BlockLease> rest = pool_.Reserve(blocks - matched);
    EXPECT_OK(rest);
    lease.Append(*std::move(rest));
    cache_.Insert(seed_, tokens, lease, matched);
    return lease;
  }

  const Hash128 seed_ = BlockHashSeed("secret", "model", "");
  BlockPool pool_{16};
  PrefixCache cache_{&pool_, kBlock, true};
};

TEST_F(PrefixCacheTest, FindsFullBlocksOnly) {
  BlockLease lease = Compute(Tokens(40));
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(40), kMany), 2);
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(40), 1), 1);
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(31), kMany), 1);
  EXPECT_EQ(cache_.CountMatch(BlockHashSeed("secret", "model", "salt"), Tokens(40), kMany), 0);
  BlockLease shared = cache_.Match(seed_, Tokens(100), kMany);
  EXPECT_THAT(Blocks(shared), testing::ElementsAre(lease.blocks()[0], lease.blocks()[1]));
}

TEST_F(PrefixCacheTest, SharedBlocksOutliveTheirFirstOwner) {
  BlockLease lease = Compute(Tokens(32));
  BlockLease shared = cache_.Match(seed_, Tokens(33), kMany);
  lease.Release();
  EXPECT_EQ(pool_.counts(), (BlockPoolCounts{.total = 16, .free = 14, .used = 2}));
  shared.Release();
  EXPECT_EQ(pool_.counts(), (BlockPoolCounts{.total = 16, .free = 14, .cached = 2}));
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(33), kMany), 2);
}

TEST_F(PrefixCacheTest, CountsQueriesAndHits) {
  Compute(Tokens(48)).Release();
  EXPECT_EQ(cache_.query_tokens(), 48u);
  EXPECT_EQ(cache_.hit_tokens(), 0u);
  Compute(Tokens(60)).Release();
  EXPECT_EQ(cache_.query_tokens(), 108u);
  EXPECT_EQ(cache_.hit_tokens(), 48u);
}

TEST_F(PrefixCacheTest, MatchMoreTakesWhatWasCachedSince) {
  Compute(Tokens(32)).Release();
  BlockLease held = cache_.Match(seed_, Tokens(64), kMany);
  EXPECT_TRUE(cache_.MatchMore(seed_, Tokens(64), held, 2, kMany).empty());
  BlockLease other = Compute(Tokens(64));
  const uint64_t queries = cache_.query_tokens();
  const uint64_t hits = cache_.hit_tokens();
  BlockLease more = cache_.MatchMore(seed_, Tokens(64), held, 2, kMany);
  EXPECT_THAT(Blocks(more), testing::ElementsAre(other.blocks()[2], other.blocks()[3]));
  EXPECT_EQ(cache_.query_tokens(), queries);
  EXPECT_EQ(cache_.hit_tokens(), hits + 32);
}

TEST_F(PrefixCacheTest, LookingAgainHashesOnlyWhatIsNew) {
  int hashes = 0;
  BlockPool pool(64);
  PrefixCache cache(&pool, kBlock, true,
                    [&](const Hash128& parent, std::span<const int32_t> tokens) {
                      ++hashes;
                      return ChainBlockHash(parent, tokens);
                    });
  const std::vector<int32_t> tokens = Tokens(40 * kBlock);
  BlockLease lease = *pool.Reserve(40);
  const auto insert = [&](int blocks, int from) {
    cache.Insert(seed_, std::span(tokens).first(static_cast<size_t>(blocks * kBlock)), lease, from);
  };
  PromptMatch known;
  const auto look = [&] { return cache.CountMatch(seed_, tokens, 39, &known); };
  insert(30, 0);
  EXPECT_EQ(look(), 30);
  hashes = 0;
  EXPECT_EQ(look(), 30);
  EXPECT_EQ(hashes, 0);  // nothing has changed
  insert(32, 30);
  hashes = 0;
  EXPECT_EQ(look(), 32);
  EXPECT_EQ(hashes, 3);
  EXPECT_EQ(known.num_idle, 0);
  lease.Release();
  hashes = 0;
  EXPECT_EQ(look(), 32);
  EXPECT_EQ(known.num_idle, 32);
  EXPECT_LE(hashes, 1);
  const BlockLease all = *pool.Reserve(60);  // evicts the end of the chain
  EXPECT_EQ(look(), 4);
  EXPECT_EQ(look(), cache.CountMatch(seed_, tokens, 39));
  BlockLease held = cache.Match(seed_, tokens, 3);
  hashes = 0;
  EXPECT_EQ(cache.MatchMore(seed_, tokens, held, 3, 39).size(), 1);
  EXPECT_LE(hashes, 2);
}

TEST_F(PrefixCacheTest, CountMatchTellsIdleBlocks) {
  Compute(Tokens(48)).Release();
  BlockLease head = cache_.Match(seed_, Tokens(48), 1);
  int idle = -1;
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(48), kMany, &idle), 3);
  EXPECT_EQ(idle, 2);
}

TEST_F(PrefixCacheTest, ReserveEvictsTailBeforeHead) {
  Compute(Tokens(16 * 16)).Release();
  EXPECT_EQ(pool_.NumAvailable(), 16);
  BlockLease lease = *pool_.Reserve(5);
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(16 * 16), kMany), 11);
}

TEST_F(PrefixCacheTest, EqualPromptsComputedAtOnceKeepOneCopy) {
  BlockLease a = *pool_.Reserve(2);
  BlockLease b = *pool_.Reserve(2);
  cache_.Insert(seed_, Tokens(16), a, 0);
  cache_.Insert(seed_, Tokens(16), b, 0);  // a's copy is known: b's stays its own
  cache_.Insert(seed_, Tokens(32), b, 1);
  cache_.Insert(seed_, Tokens(32), a, 1);
  BlockLease found = cache_.Match(seed_, Tokens(32), kMany);
  EXPECT_THAT(Blocks(found), testing::ElementsAre(a.blocks()[0], b.blocks()[1]));
  found.Release();
  a.Release();
  b.Release();
  EXPECT_EQ(pool_.counts(), (BlockPoolCounts{.total = 16, .free = 14, .cached = 2}));
}

TEST_F(PrefixCacheTest, DuplicateTakesOverWhenTheOriginalWasEvicted) {
  BlockLease a = *pool_.Reserve(1);
  BlockLease b = *pool_.Reserve(2);
  cache_.Insert(seed_, Tokens(16), a, 0);
  cache_.Insert(seed_, Tokens(32), b, 0);  // b1 hangs under a0
  a.Release();
  BlockLease rest = *pool_.Reserve(14);  // evicts a0: b1 is an orphan
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(32), kMany), 0);
  cache_.Insert(seed_, Tokens(32), b, 2);  // b0 takes a0's place, b1 moves under it
  BlockLease found = cache_.Match(seed_, Tokens(32), kMany);
  EXPECT_THAT(Blocks(found), testing::ElementsAre(b.blocks()[0], b.blocks()[1]));
}

TEST_F(PrefixCacheTest, UnreachableBlocksAreNotKept) {
  BlockLease a = *pool_.Reserve(1);
  BlockLease b = *pool_.Reserve(2);
  cache_.Insert(seed_, Tokens(16), a, 0);
  cache_.Insert(seed_, Tokens(32), b, 0);
  a.Release();
  { BlockLease rest = *pool_.Reserve(14); }
  b.Release();
  EXPECT_EQ(pool_.counts(), (BlockPoolCounts{.total = 16, .free = 16}));
  const BlockEvents events = cache_.TakeEvents();  // stored and removed again: no net change
  EXPECT_TRUE(events.stored.empty());
  EXPECT_TRUE(events.removed.empty());
}

TEST_F(PrefixCacheTest, ClearKeepsWhatIsInUse) {
  Compute(Tokens(32, 1000)).Release();
  BlockLease lease = Compute(Tokens(32));
  cache_.Clear();
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(32, 1000), kMany), 0);
  EXPECT_EQ(cache_.CountMatch(seed_, Tokens(32), kMany), 2);
}

TEST_F(PrefixCacheTest, EventsTellStoredAndRemoved) {
  const std::vector<int32_t> tokens = Tokens(32);
  const std::vector<Hash128> hashes = HashTokenBlocks(seed_, tokens, kBlock);
  Compute(tokens).Release();
  EXPECT_THAT(cache_.TakeEvents().stored, testing::UnorderedElementsAreArray(hashes));
  cache_.Clear();
  const BlockEvents events = cache_.TakeEvents();
  EXPECT_TRUE(events.stored.empty());
  EXPECT_THAT(events.removed, testing::UnorderedElementsAreArray(hashes));
  EXPECT_TRUE(cache_.Snapshot().empty());
}

TEST_F(PrefixCacheTest, QuarantineLeavesSharedBlocksCached) {
  BlockLease lease = Compute(Tokens(40));
  const uint64_t ticket = pool_.Quarantine(std::move(lease));
  EXPECT_EQ(pool_.counts(),
            (BlockPoolCounts{.total = 16, .free = 13, .cached = 2, .quarantined = 1}));
  pool_.ReleaseQuarantine(ticket);
  EXPECT_EQ(pool_.NumAvailable(), 16);
}

TEST(PrefixCache, DisabledKeepsNothing) {
  BlockPool pool(4);
  PrefixCache cache(&pool, kBlock, false);
  BlockLease lease = *pool.Reserve(2);
  cache.Insert(Hash128{}, Tokens(32), lease, 0);
  EXPECT_EQ(cache.CountMatch(Hash128{}, Tokens(32), kMany), 0);
  EXPECT_TRUE(cache.Match(Hash128{}, Tokens(32), kMany).empty());
  lease.Release();
  EXPECT_EQ(pool.counts().free, 4);
}

TEST(PrefixCache, ForgedHashNeverServesOtherTokens) {
  BlockPool pool(8);
  // Every block has the same hash, whatever it holds.
  PrefixCache cache(&pool, kBlock, true, [](const Hash128&, std::span<const int32_t>) {
    return Hash128{1, 2};
  });
  BlockLease a = *pool.Reserve(2);
  cache.Insert(Hash128{}, Tokens(32), a, 0);
  EXPECT_EQ(cache.CountMatch(Hash128{}, Tokens(32), kMany), 1);
  EXPECT_EQ(cache.CountMatch(Hash128{}, Tokens(32, 5), kMany), 0);
  BlockLease b = *pool.Reserve(2);
  cache.Insert(Hash128{}, Tokens(32, 5), b, 0);
  EXPECT_EQ(cache.CountMatch(Hash128{}, Tokens(32, 5), kMany), 0);
}

TEST(PrefixCache, BlockAfterAForgedOneIsNotServedToTheOther) {
  // The first blocks of two prompts collide, their second blocks hold the same tokens: KV of the
  // second block differs nevertheless, because it depends on the first.
  std::vector<int32_t> a_tokens = Tokens(32);
  std::vector<int32_t> b_tokens = a_tokens;
  b_tokens[0] = 999;
  const Hash128 forged{7, 7};
  BlockPool pool(8);
  PrefixCache cache(&pool, kBlock, true,
                    [&](const Hash128& parent, std::span<const int32_t> tokens) {
                      return parent == Hash128{} ? forged : ChainBlockHash(parent, tokens);
                    });
  BlockLease a = *pool.Reserve(1);
  BlockLease b = *pool.Reserve(2);
  cache.Insert(Hash128{}, std::span(a_tokens).first(16), a, 0);
  cache.Insert(Hash128{}, std::span(b_tokens).first(16), b, 0);
  cache.Insert(Hash128{}, b_tokens, b, 1);
  EXPECT_EQ(cache.CountMatch(Hash128{}, a_tokens, kMany), 1);
  EXPECT_EQ(cache.CountMatch(Hash128{}, b_tokens, kMany), 0);
}

}  // namespace
}  // namespace tandem::engine
