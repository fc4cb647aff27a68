#include "router/prefix_index/prefix_index.h"

#include <map>
#include <random>
#include <set>
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

// Against sets, under random events with repeats and with removals of what is not there.
TEST(PrefixIndex, AgreesWithPlainSets) {
  std::mt19937 random(7);
  PrefixIndex index;
  std::map<PrefixIndex::Slot, std::set<std::pair<uint64_t, uint64_t>>> truth;
  for (int w = 0; w < 4; ++w) truth[index.AddWorker(1000)] = {};
  for (int step = 0; step < 2000; ++step) {
    const auto slot = static_cast<PrefixIndex::Slot>(random() % 4);
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
  }
}

}  // namespace
}  // namespace tandem::router
