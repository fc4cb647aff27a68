#include "router/dispatch/suspect_prompts.h"

#include "gtest/gtest.h"

#include "simulation/fake_clock.h"

namespace tandem::router {
namespace {

const Hash128 kPrompt = {1, 2};

TEST(SuspectPrompts, TwoDeathsMakeAPoison) {
  FakeClock clock;
  SuspectPrompts suspects(&clock, 10, absl::Minutes(1));
  EXPECT_TRUE(suspects.empty());
  suspects.NoteDeath(kPrompt);
  EXPECT_FALSE(suspects.IsPoison(kPrompt));
  clock.Advance(absl::Seconds(59));
  suspects.NoteDeath(kPrompt);
  EXPECT_TRUE(suspects.IsPoison(kPrompt));
  EXPECT_FALSE(suspects.IsPoison({3, 4}));
  clock.Advance(absl::Seconds(59));
  EXPECT_TRUE(suspects.IsPoison(kPrompt));
  clock.Advance(absl::Seconds(1));
  EXPECT_FALSE(suspects.IsPoison(kPrompt));
  EXPECT_TRUE(suspects.empty());
}

TEST(SuspectPrompts, WhoIsServedIsNotToBlame) {
  FakeClock clock;
  SuspectPrompts suspects(&clock);
  suspects.NoteDeath(kPrompt);
  suspects.NoteServed(kPrompt);
  suspects.NoteServed({3, 4});
  suspects.NoteDeath(kPrompt);
  EXPECT_FALSE(suspects.IsPoison(kPrompt));
}

TEST(SuspectPrompts, TheOldestAreForgottenFirst) {
  FakeClock clock;
  SuspectPrompts suspects(&clock, 2);
  suspects.NoteDeath({1, 0}, 2);
  suspects.NoteDeath({2, 0}, 2);
  suspects.NoteDeath({1, 0});
  suspects.NoteDeath({3, 0}, 2);
  EXPECT_TRUE(suspects.IsPoison({1, 0}));
  EXPECT_FALSE(suspects.IsPoison({2, 0}));
  EXPECT_TRUE(suspects.IsPoison({3, 0}));
}

}  // namespace
}  // namespace tandem::router
