#include "decode_worker/ngram_drafter.h"

#include <algorithm>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::decode {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<int32_t> Proposed(const std::vector<int32_t>& tokens, int most) {
  return NgramDrafter().Propose(tokens, most).tokens;
}

TEST(NgramDrafterTest, GoesOnAsTheTextDid) {
  EXPECT_THAT(Proposed({1, 2, 3, 4, 5, 9, 2, 3}, 2), ElementsAre(4, 5));
  EXPECT_THAT(Proposed({1, 2, 3, 4, 5, 9, 3}, 2), IsEmpty());  // one token may be chance
  EXPECT_THAT(Proposed({1, 2, 3, 4, 5, 9, 2, 3}, 0), IsEmpty());
  EXPECT_THAT(Proposed({2, 3}, 4), IsEmpty());  // the end is no match of itself
  EXPECT_THAT(Proposed({7}, 4), IsEmpty());
}

TEST(NgramDrafterTest, TheLongestAgreementWinsThenTheNewest) {
  EXPECT_THAT(Proposed({1, 2, 3, 7, 2, 3, 8, 1, 2, 3}, 1), ElementsAre(7));
  EXPECT_THAT(Proposed({4, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3}, 1), ElementsAre(8));
}

TEST(NgramDrafterTest, ARepeatedLineIsRepeatedFurther) {
  EXPECT_THAT(Proposed({1, 2, 1, 2}, 5), ElementsAre(1, 2, 1, 2, 1));
  EXPECT_THAT(Proposed({6, 6, 6}, 4), ElementsAre(6, 6, 6, 6));
}

TEST(NgramDrafterTest, TheEvidenceIsWhatAgrees) {
  EXPECT_EQ(NgramDrafter().Propose(std::vector<int32_t>{1, 2, 3, 7, 2, 3, 8, 1, 2, 3}, 1).evidence,
            3);
  EXPECT_EQ(NgramDrafter().Propose(std::vector<int32_t>(100, 6), 1).evidence,
            NgramDrafter::kLongestMatch);
}

// The same by looking at every position, from the newest on.
Draft SlowDraft(const std::vector<int32_t>& tokens, int most) {
  Draft draft;
  const int end = static_cast<int>(tokens.size()) - 1;
  int best = -1;
  int candidates = 0;
  for (int at = end - 1; at >= 1 && candidates < NgramDrafter::kCandidates; --at) {
    int agreement = 0;
    while (agreement <= at && agreement < NgramDrafter::kLongestMatch &&
           tokens[static_cast<size_t>(at - agreement)] ==
               tokens[static_cast<size_t>(end - agreement)]) {
      ++agreement;
    }
    if (agreement < NgramDrafter::kShortestMatch) continue;
    ++candidates;
    if (agreement <= draft.evidence) continue;
    draft.evidence = agreement;
    best = at;
  }
  if (best < 0) return draft;
  std::vector<int32_t> text = tokens;
  for (int i = 0; i < most; ++i) {
    text.push_back(text[static_cast<size_t>(best + 1 + i)]);
    draft.tokens.push_back(text.back());
  }
  return draft;
}

TEST(NgramDrafterTest, DoesWhatASlowOneDoesHoweverOftenItIsAsked) {
  int drafted = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    std::mt19937 random(seed);
    const uint32_t vocab = 2 + random() % 12;
    NgramDrafter drafter;
    std::vector<int32_t> tokens;
    for (int turn = 0; turn < 60; ++turn) {
      // New tokens, or a piece of what is there, as an answer quotes.
      const size_t more = 1 + random() % 6;
      const size_t from = tokens.empty() ? 0 : random() % tokens.size();
      for (size_t i = 0; i < more; ++i) {
        tokens.push_back(random() % 2 == 0 || from + i >= tokens.size()
                             ? static_cast<int32_t>(random() % vocab)
                             : tokens[from + i]);
      }
      const int most = static_cast<int>(random() % 9);
      const Draft got = drafter.Propose(tokens, most);
      if (most == 0) continue;
      const Draft want = SlowDraft(tokens, most);
      ASSERT_EQ(got.tokens, want.tokens) << "seed " << seed << " turn " << turn;
      ASSERT_EQ(got.evidence, want.evidence) << "seed " << seed << " turn " << turn;
      drafted += got.tokens.empty() ? 0 : 1;
    }
  }
  EXPECT_GT(drafted, 1000);
}

}  // namespace
}  // namespace tandem::decode
