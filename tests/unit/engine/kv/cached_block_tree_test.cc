#include "engine/kv/cached_block_tree.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::engine {
namespace {

using testing::ElementsAre;

// Adds a chain of blocks in use.
void AddChain(CachedBlockTree& tree, const std::vector<int32_t>& blocks,
              CachedBlockId parent = {}) {
  for (const int32_t block : blocks) {
    tree.Add(block, parent);
    parent = tree.Id(block);
  }
}

void SetIdle(CachedBlockTree& tree, const std::vector<int32_t>& blocks, uint64_t stamp) {
  for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) tree.SetIdle(*it, stamp);
}

std::vector<int32_t> EvictAll(CachedBlockTree& tree) {
  std::vector<int32_t> order;
  while (tree.Victim() >= 0) {
    order.push_back(tree.Victim());
    tree.Remove(order.back());
  }
  return order;
}

TEST(CachedBlockTree, GivesUpOldestChainFirstTailFirst) {
  CachedBlockTree tree(8);
  AddChain(tree, {0, 1, 2});
  AddChain(tree, {3, 4});
  SetIdle(tree, {3, 4}, 1);
  SetIdle(tree, {0, 1, 2}, 2);
  EXPECT_EQ(tree.num_idle(), 5);
  EXPECT_THAT(EvictAll(tree), ElementsAre(4, 3, 2, 1, 0));
  EXPECT_EQ(tree.num_idle(), 0);
}

TEST(CachedBlockTree, HeadReleasedBeforeTailStillGoesLast) {
  CachedBlockTree tree(4);
  AddChain(tree, {0, 1, 2});
  tree.SetIdle(0, 1);
  tree.SetIdle(1, 2);
  tree.SetIdle(2, 3);
  EXPECT_THAT(EvictAll(tree), ElementsAre(2, 1, 0));
}

TEST(CachedBlockTree, HeadInUseByNobodyWithTailInUseMayGo) {
  CachedBlockTree tree(4);
  AddChain(tree, {0, 1});
  tree.SetIdle(0, 1);
  EXPECT_EQ(tree.Victim(), 0);
  tree.Remove(0);
  EXPECT_TRUE(tree.IsOrphan(1));
}

TEST(CachedBlockTree, SharedHeadUsedLaterOutlivesOldTails) {
  CachedBlockTree tree(8);
  AddChain(tree, {0, 1});
  AddChain(tree, {2}, tree.Id(1));
  AddChain(tree, {5});
  SetIdle(tree, {0, 1, 2}, 1);
  SetIdle(tree, {5}, 2);
  // Another prompt uses the head only.
  tree.SetInUse(0);
  tree.SetInUse(1);
  SetIdle(tree, {0, 1}, 3);
  // Old tail, then the chain released next, then the head that was used last.
  EXPECT_THAT(EvictAll(tree), ElementsAre(2, 5, 1, 0));
}

TEST(CachedBlockTree, StaysTellReusesApart) {
  CachedBlockTree tree(2);
  tree.Add(0, {});
  const CachedBlockId first = tree.Id(0);
  tree.Remove(0);
  EXPECT_FALSE(tree.Alive(first));
  tree.Add(0, {});
  EXPECT_FALSE(tree.Alive(first));
  EXPECT_TRUE(tree.Alive(tree.Id(0)));
}

}  // namespace
}  // namespace tandem::engine
