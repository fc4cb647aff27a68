#include "router/prefix_index/prefix_index.h"

#include <atomic>
#include <iterator>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::router {
namespace {

using ::testing::IsEmpty;

std::vector<Hash128> Chain(uint64_t name, int length) {
  std::vector<Hash128> out;
  for (int i = 0; i < length; ++i) out.push_back({name, static_cast<uint64_t>(i)});
  return out;
}

std::map<PrefixIndex::Slot, int> Lookup(const PrefixIndex& index,
                                        const std::vector<Hash128>& chain) {
  std::map<PrefixIndex::Slot, int> out;
  for (const PrefixIndex::Match& match : index.Lookup(chain)) out[match.worker] = match.blocks;
  return out;
}

TEST(PrefixIndex, FindsTheLongestPrefixOfEachWorker) {
  PrefixIndex index;
  const auto a = index.AddWorker(100), b = index.AddWorker(100), c = index.AddWorker(100);
  const std::vector<Hash128> chain = Chain(1, 10);
  index.Apply(a, false, std::span(chain).first(3), {});
  index.Apply(b, false, chain, {});
  index.Apply(c, false, std::span(chain).subspan(1), {});  // without the first block: nothing
  EXPECT_EQ(Lookup(index, chain), (std::map<PrefixIndex::Slot, int>{{a, 3}, {b, 10}}));
  EXPECT_THAT(Lookup(index, Chain(2, 4)), IsEmpty());
  EXPECT_THAT(Lookup(index, {}), IsEmpty());

  index.Apply(b, false, {}, std::span(chain).subspan(5, 1));
  EXPECT_EQ(Lookup(index, chain), (std::map<PrefixIndex::Slot, int>{{a, 3}, {b, 5}}));
}

TEST(PrefixIndex, ASnapshotReplacesWhatWasKnown) {
  PrefixIndex index;
  const auto a = index.AddWorker(100);
  index.Apply(a, false, Chain(1, 8), {});
  index.Apply(a, true, Chain(2, 3), {});
  EXPECT_THAT(Lookup(index, Chain(1, 8)), IsEmpty());
  EXPECT_EQ(Lookup(index, Chain(2, 3)).at(a), 3);
  EXPECT_EQ(index.size(), 3u);
}

TEST(PrefixIndex, ARemovedWorkerLeavesNothingBehind) {
  PrefixIndex index;
  const auto a = index.AddWorker(100), b = index.AddWorker(100);
  index.Apply(a, false, Chain(1, 8), {});
  index.Apply(b, false, Chain(1, 4), {});
  index.RemoveWorker(a);
  index.Apply(a, false, Chain(1, 8), {});  // a late event
  EXPECT_EQ(index.size(), 4u);
  EXPECT_EQ(Lookup(index, Chain(1, 8)), (std::map<PrefixIndex::Slot, int>{{b, 4}}));
  index.RemoveWorker(b);
  EXPECT_EQ(index.size(), 0u);
}

TEST(PrefixIndex, IsBoundedPerWorker) {
  PrefixIndex index;
  const auto a = index.AddWorker(5);
  index.Apply(a, false, Chain(1, 8), {});
  EXPECT_EQ(index.WorkerBlocks(a), 5u);
  EXPECT_EQ(Lookup(index, Chain(1, 8)).at(a), 5);
}

TEST(PrefixIndex, AFullCacheThatEvictsForNewBlocksIsFollowed) {
  PrefixIndex index;
  const auto a = index.AddWorker(4);
  index.Apply(a, false, Chain(1, 4), {});
  index.Apply(a, false, Chain(2, 4), Chain(1, 4));
  EXPECT_EQ(Lookup(index, Chain(2, 4)), (std::map<PrefixIndex::Slot, int>{{a, 4}}));
  EXPECT_EQ(Lookup(index, Chain(1, 4)), (std::map<PrefixIndex::Slot, int>{}));
  // What is in both lists is gone.
  index.Apply(a, false, Chain(2, 4), Chain(2, 4));
  EXPECT_EQ(index.WorkerBlocks(a), 0u);
}

void ExpectToAgreeWithPlainSets(int workers) {
  std::mt19937 random(7);
  PrefixIndex index;
  std::map<PrefixIndex::Slot, std::set<std::pair<uint64_t, uint64_t>>> truth;
  for (int w = 0; w < workers; ++w) truth[index.AddWorker(1000)] = {};
  for (int step = 0; step < 4000; ++step) {
    const auto slot = std::next(truth.begin(), random() % workers)->first;
    if (random() % 200 == 0) {
      index.RemoveWorker(slot);
      truth.erase(slot);
      truth[index.AddWorker(1000)] = {};
      continue;
    }
    std::vector<Hash128> stored, removed;
    for (unsigned i = 0; i < random() % 4; ++i) stored.push_back({random() % 3, random() % 8});
    for (unsigned i = 0; i < random() % 3; ++i) removed.push_back({random() % 3, random() % 8});
    const bool cleared = random() % 100 == 0;
    if (cleared) truth[slot].clear();
    for (const Hash128& hash : stored) truth[slot].insert({hash.high, hash.low});
    for (const Hash128& hash : removed) truth[slot].erase({hash.high, hash.low});
    index.Apply(slot, cleared, stored, removed);

    const uint64_t name = random() % 3;
    std::map<PrefixIndex::Slot, int> expected;
    for (const auto& [worker, blocks] : truth) {
      int length = 0;
      while (blocks.count({name, static_cast<uint64_t>(length)}) > 0) ++length;
      if (length > 0) expected[worker] = length;
    }
    ASSERT_EQ(Lookup(index, Chain(name, 8)), expected) << "step " << step;
    if (step % 500 == 0) {
      std::set<std::pair<uint64_t, uint64_t>> all;
      for (const auto& [worker, blocks] : truth) {
        all.insert(blocks.begin(), blocks.end());
        ASSERT_EQ(index.WorkerBlocks(worker), blocks.size());
      }
      ASSERT_EQ(index.size(), all.size());
    }
  }
  for (const auto& [worker, blocks] : truth) index.RemoveWorker(worker);
  EXPECT_EQ(index.size(), 0u);
}

// Against sets, under random events with repeats and with removals of what is not there, while
// workers come and go.
TEST(PrefixIndex, AgreesWithPlainSets) {
  for (const int workers : {4, 40}) {
    SCOPED_TRACE(workers);
    ExpectToAgreeWithPlainSets(workers);
  }
}

// The walk does as much for a prefix that a thousand workers share as for one that one worker has,
// but for the places where workers leave it.
TEST(PrefixIndex, ManyHoldersOfALongPrefix) {
  PrefixIndex index;
  const std::vector<Hash128> chain = Chain(1, 2000);
  std::map<PrefixIndex::Slot, int> expected;
  for (int w = 0; w < 300; ++w) {
    const int length = 2000 - w;
    const auto worker = index.AddWorker(5000);
    index.Apply(worker, false, std::span(chain).first(static_cast<size_t>(length)), {});
    expected[worker] = length;
  }
  EXPECT_EQ(Lookup(index, chain), expected);
  EXPECT_EQ(index.size(), 2000u);
}

TEST(PrefixIndex, LookupsGoOnDuringALongMessage) {
  PrefixIndex index;
  const auto a = index.AddWorker(1'000'000), b = index.AddWorker(100);
  const std::vector<Hash128> chain = Chain(1, 10);
  index.Apply(b, false, chain, {});
  const std::vector<Hash128> many = Chain(2, 300'000);
  std::atomic<bool> done = false;
  std::thread writer([&] {
    index.Apply(a, false, many, {});
    index.RemoveWorker(a);
    done = true;
  });
  int lookups = 0;
  while (!done) {
    EXPECT_EQ(Lookup(index, chain).at(b), 10);
    ++lookups;
  }
  writer.join();
  EXPECT_GT(lookups, 20);
  EXPECT_EQ(index.size(), 10u);
}

TEST(HolderSets, SetsAreSharedAndLeaveNothingBehind) {
  HolderSets sets;
  std::vector<Holders> blocks(100);
  for (int column = 0; column < 50; ++column) {
    for (Holders& holders : blocks) holders = sets.With(holders, static_cast<Column>(column));
  }
  EXPECT_EQ(sets.shared_sets(), 1u);
  EXPECT_EQ(sets.Columns(blocks[7]).size(), 50u);
  EXPECT_TRUE(blocks[7] == blocks[93]);
  blocks[7] = sets.Without(blocks[7], 20);
  EXPECT_EQ(sets.shared_sets(), 2u);
  EXPECT_FALSE(sets.Has(blocks[7], 20));
  EXPECT_TRUE(sets.Has(blocks[8], 20));
  blocks[7] = sets.With(blocks[7], 20);
  EXPECT_TRUE(blocks[7] == blocks[8]);
  for (int column = 49; column >= 0; --column) {
    for (Holders& holders : blocks) holders = sets.Without(holders, static_cast<Column>(column));
  }
  EXPECT_EQ(sets.shared_sets(), 0u);
  for (const Holders& holders : blocks) EXPECT_TRUE(sets.Empty(holders));
}

}  // namespace
}  // namespace tandem::router
