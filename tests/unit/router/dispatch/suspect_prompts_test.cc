#include "router/dispatch/suspect_prompts.h"

#include <memory>

#include "gtest/gtest.h"

#include "simulation/fake_clock.h"

namespace tandem::router {
namespace {

const Hash128 kPrompt = {1, 2};
const ClusterView kNobody;

Loss LossOf(uint64_t incarnation, absl::Time at = absl::UnixEpoch()) {
  return {"d", incarnation, at};
}

TEST(SuspectPrompts, TwoDeathsMakeAPoison) {
  FakeClock clock;
  SuspectPrompts suspects(&clock, 10, absl::Minutes(1));
  EXPECT_TRUE(suspects.empty());
  suspects.NoteLoss(kPrompt, LossOf(1));
  EXPECT_FALSE(suspects.IsPoison(kPrompt, kNobody));
  clock.Advance(absl::Seconds(59));
  suspects.NoteLoss(kPrompt, LossOf(2));
  EXPECT_TRUE(suspects.IsPoison(kPrompt, kNobody));
  EXPECT_FALSE(suspects.IsPoison({3, 4}, kNobody));
  clock.Advance(absl::Seconds(59));
  EXPECT_TRUE(suspects.IsPoison(kPrompt, kNobody));
  clock.Advance(absl::Seconds(1));
  EXPECT_FALSE(suspects.IsPoison(kPrompt, kNobody));
  EXPECT_TRUE(suspects.empty());
}

// Two clients with one prompt, and one worker that dies under both.
TEST(SuspectPrompts, AProcessThatWasLostWithTwoRequestsDiedOnce) {
  FakeClock clock;
  SuspectPrompts suspects(&clock);
  suspects.NoteLoss(kPrompt, LossOf(1));
  suspects.NoteLoss(kPrompt, LossOf(1));
  EXPECT_FALSE(suspects.IsPoison(kPrompt, kNobody));
}

TEST(SuspectPrompts, WhoLivesDidNotDieOfIt) {
  FakeClock clock;
  SuspectPrompts suspects(&clock);
  suspects.NoteLoss(kPrompt, LossOf(1, clock.Now()));
  suspects.NoteLoss(kPrompt, LossOf(2, clock.Now()));
  auto identity = std::make_shared<WorkerIdentity>();
  identity->id = "d";
  identity->incarnation = 2;
  ClusterView view;
  view.workers.push_back({.identity = identity, .progressed = clock.Now()});
  EXPECT_TRUE(suspects.IsPoison(kPrompt, view));
  view.workers.front().progressed += absl::Seconds(1);
  EXPECT_FALSE(suspects.IsPoison(kPrompt, view));
}

TEST(SuspectPrompts, WhoIsServedIsNotToBlame) {
  FakeClock clock;
  SuspectPrompts suspects(&clock);
  suspects.NoteLoss(kPrompt, LossOf(1));
  suspects.NoteServed(kPrompt);
  suspects.NoteServed({3, 4});
  suspects.NoteLoss(kPrompt, LossOf(2));
  EXPECT_FALSE(suspects.IsPoison(kPrompt, kNobody));
}

TEST(SuspectPrompts, TheOldestAreForgottenFirst) {
  FakeClock clock;
  SuspectPrompts suspects(&clock, 2);
  const auto kill_two = [&](const Hash128& prompt) {
    for (const uint64_t incarnation : {1, 2}) suspects.NoteLoss(prompt, LossOf(incarnation));
  };
  kill_two({1, 0});
  kill_two({2, 0});
  suspects.NoteLoss({1, 0}, LossOf(3));
  kill_two({3, 0});
  EXPECT_TRUE(suspects.IsPoison({1, 0}, kNobody));
  EXPECT_FALSE(suspects.IsPoison({2, 0}, kNobody));
  EXPECT_TRUE(suspects.IsPoison({3, 0}, kNobody));
}

}  // namespace
}  // namespace tandem::router
