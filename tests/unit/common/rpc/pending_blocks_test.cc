#include "common/rpc/pending_blocks.h"

#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem {
namespace {

using internal::v1::BlockEvents;
using testing::ElementsAre;

BlockEvents Events(std::vector<std::string> stored, std::vector<std::string> removed,
                   bool cleared = false) {
  BlockEvents events;
  events.set_cleared(cleared);
  for (auto& hash : stored) events.add_stored(std::move(hash));
  for (auto& hash : removed) events.add_removed(std::move(hash));
  return events;
}

TEST(PendingBlocksTest, KeepsTheLastWordOnAHash) {
  PendingBlocks pending;
  EXPECT_TRUE(pending.empty());
  EXPECT_EQ(pending.Take(10), std::nullopt);
  pending.Merge(Events({"a", "b"}, {}));
  pending.Merge(Events({}, {"a", "c"}));
  pending.Merge(Events({"c"}, {}));
  const auto events = pending.Take(10);
  ASSERT_TRUE(events);
  EXPECT_THAT(events->stored(), ElementsAre("b", "c"));
  EXPECT_THAT(events->removed(), ElementsAre("a"));
  EXPECT_FALSE(events->cleared());
  EXPECT_TRUE(pending.empty());
}

TEST(PendingBlocksTest, ClearedForgetsWhatCameBeforeAndGoesFirst) {
  PendingBlocks pending;
  pending.Merge(Events({"a"}, {}));
  pending.Merge(Events({"p", "q", "r"}, {}, true));
  const auto first = pending.Take(2);
  EXPECT_TRUE(first->cleared());
  EXPECT_THAT(first->stored(), ElementsAre("p", "q"));
  const auto second = pending.Take(2);
  EXPECT_FALSE(second->cleared());
  EXPECT_THAT(second->stored(), ElementsAre("r"));
  EXPECT_EQ(pending.Take(2), std::nullopt);
  pending.Merge(Events({}, {}, true));
  EXPECT_FALSE(pending.empty());
  EXPECT_TRUE(pending.Take(2)->cleared());
}

// A receiver that applies the merged events ends with the same set as one that saw every event.
TEST(PendingBlocksTest, MergedMeansTheSameAsTheSequence) {
  uint32_t random = 1;
  const auto draw = [&random](uint32_t n) {
    random = random * 1664525 + 1013904223;
    return (random >> 16) % n;
  };
  std::set<std::string> expected;
  std::set<std::string> got;
  const auto apply = [](const BlockEvents& events, std::set<std::string>* set) {
    if (events.cleared()) set->clear();
    for (const auto& hash : events.stored()) set->insert(hash);
    for (const auto& hash : events.removed()) set->erase(hash);
  };
  PendingBlocks pending;
  for (int step = 0; step < 5000; ++step) {
    BlockEvents events;
    events.set_cleared(draw(200) == 0);
    for (uint32_t i = draw(4); i > 0; --i) events.add_stored(std::to_string(draw(30)));
    for (uint32_t i = draw(4); i > 0; --i) events.add_removed(std::to_string(draw(30)));
    apply(events, &expected);
    pending.Merge(events);
    if (draw(5) == 0) {
      while (const auto taken = pending.Take(1 + draw(7))) apply(*taken, &got);
      ASSERT_EQ(got, expected) << "step " << step;
    }
  }
}

}  // namespace
}  // namespace tandem
