#include "worker/prompt_batch.h"

#include <algorithm>
#include <random>
#include <set>

#include "gtest/gtest.h"

namespace tandem::worker {
namespace {

int TokensOf(const std::vector<PromptChunk>& chunks, int prompt) {
  for (const PromptChunk& chunk : chunks) {
    if (chunk.prompt == prompt) return chunk.num_tokens;
  }
  return 0;
}

TEST(PromptBatch, NothingToDo) { EXPECT_TRUE(NextPromptBatch({}, {}).empty()); }

TEST(PromptBatch, SeveralPromptsShareABatch) {
  const std::vector<PromptView> prompts = {{100, 0, 1}, {50, 0, 2}, {30, 0, 3}};
  const auto chunks = NextPromptBatch(prompts, {.max_num_batched_tokens = 256});
  EXPECT_EQ(TokensOf(chunks, 0), 100);
  EXPECT_EQ(TokensOf(chunks, 1), 50);
  EXPECT_EQ(TokensOf(chunks, 2), 30);
}

TEST(PromptBatch, ShortPromptsDoNotWaitForALongOne) {
  const std::vector<PromptView> prompts = {{30'000, 0, 1}, {200, 0, 2}, {300, 0, 3}};
  const auto chunks = NextPromptBatch(prompts, {.max_num_batched_tokens = 1000});
  EXPECT_EQ(TokensOf(chunks, 1), 200);
  EXPECT_EQ(TokensOf(chunks, 2), 300);
  EXPECT_EQ(TokensOf(chunks, 0), 500);  // all that is left
}

TEST(PromptBatch, OldestAdvancesWhateverComes) {
  const std::vector<PromptView> prompts = {{30'000, 0, 1}, {5'000, 9, 2}, {5'000, 9, 3}};
  const auto chunks = NextPromptBatch(prompts, {.max_num_batched_tokens = 1000});
  EXPECT_EQ(TokensOf(chunks, 0), 250);
  EXPECT_EQ(TokensOf(chunks, 1), 750);
}

// Two prompts of one length do not share a batch that one of them fills.
TEST(PromptBatch, EqualPromptsComeOutOneAfterTheOther) {
  const std::vector<PromptView> prompts = {{1000, 0, 1}, {1000, 0, 2}};
  const auto chunks = NextPromptBatch(prompts, {.max_num_batched_tokens = 1000});
  EXPECT_EQ(TokensOf(chunks, 0), 1000);
  EXPECT_EQ(TokensOf(chunks, 1), 0);
}

TEST(PromptBatch, PriorityGoesBeforeLength) {
  const std::vector<PromptView> prompts = {{10, 0, 1}, {2'000, 5, 2}, {20, 0, 3}};
  const auto chunks = NextPromptBatch(prompts, {.max_num_batched_tokens = 1000});
  EXPECT_EQ(TokensOf(chunks, 0), 10);  // the oldest
  EXPECT_EQ(TokensOf(chunks, 1), 990);
  EXPECT_EQ(TokensOf(chunks, 2), 0);
}

TEST(PromptBatch, BudgetOfOneTokenServesTheOldest) {
  const std::vector<PromptView> prompts = {{10, 0, 2}, {10, 0, 1}};
  const auto chunks = NextPromptBatch(prompts, {.max_num_batched_tokens = 1});
  ASSERT_EQ(chunks.size(), 1u);
  EXPECT_EQ(chunks[0].prompt, 1);
}

class PromptBatchProperty : public testing::TestWithParam<uint64_t> {};

// Prompts of all lengths keep coming; everything ends, no budget is overrun, and nobody waits
// longer than the rule in the header allows.
TEST_P(PromptBatchProperty, EveryPromptEnds) {
  std::mt19937_64 random(GetParam());
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<uint64_t>(n)); };
  const PromptLimits limits = {.max_num_batched_tokens = 1 + pick(2048),
                               .max_num_seqs = 1 + pick(16)};
  std::vector<PromptView> prompts;
  uint64_t last_arrival = 0;
  int arrivals = 150;
  int batches = 0;
  int bound = 0;  // batches that the oldest-first share alone would need
  while (arrivals > 0 || !prompts.empty()) {
    for (int n = pick(4); n > 0 && arrivals > 0; --n, --arrivals) {
      const int length = pick(8) == 0 ? 1 + pick(30'000) : 1 + pick(300);
      prompts.push_back({length, pick(3), ++last_arrival});
      const int share = std::max(1, limits.max_num_batched_tokens / 4);
      bound += (length + share - 1) / share + 1;
    }
    const auto chunks = NextPromptBatch(prompts, limits);
    ASSERT_EQ(chunks.empty(), prompts.empty());
    int total = 0;
    int wanted = 0;
    std::set<int> seen;
    for (const PromptChunk& chunk : chunks) {
      ASSERT_TRUE(seen.insert(chunk.prompt).second);
      PromptView& prompt = prompts[static_cast<size_t>(chunk.prompt)];
      ASSERT_GT(chunk.num_tokens, 0);
      ASSERT_LE(chunk.num_tokens, prompt.remaining);
      total += chunk.num_tokens;
    }
    for (const PromptView& prompt : prompts) wanted += prompt.remaining;
    ASSERT_LE(total, limits.max_num_batched_tokens);
    ASSERT_LE(static_cast<int>(chunks.size()), limits.max_num_seqs);
    if (static_cast<int>(prompts.size()) <= limits.max_num_seqs) {
      ASSERT_EQ(total, std::min(wanted, limits.max_num_batched_tokens));  // no budget is wasted
    }
    for (const PromptChunk& chunk : chunks) {
      prompts[static_cast<size_t>(chunk.prompt)].remaining -= chunk.num_tokens;
    }
    std::erase_if(prompts, [](const PromptView& prompt) { return prompt.remaining == 0; });
    ASSERT_LE(++batches, bound + 1000);
  }
}

// A stream of short prompts that alone would fill every batch does not stop a long one, and the
// long one does not hold the short ones up.
TEST_P(PromptBatchProperty, NeitherLongNorShortStarves) {
  std::mt19937_64 random(GetParam());
  const PromptLimits limits = {.max_num_batched_tokens = 1024, .max_num_seqs = 64};
  std::vector<PromptView> prompts = {{30'000, 0, 0}};
  uint64_t arrival = 0;
  int batches = 0;
  while (!prompts.empty() && prompts[0].arrival == 0) {
    // Three quarters of a batch: what is free of the long prompt.
    std::vector<uint64_t> fresh;
    for (int left = 768; left > 0;) {
      const int length = std::min(left, 1 + static_cast<int>(random() % 200));
      prompts.push_back({length, 0, ++arrival});
      left -= length;
    }
    for (const PromptChunk& chunk : NextPromptBatch(prompts, limits)) {
      prompts[static_cast<size_t>(chunk.prompt)].remaining -= chunk.num_tokens;
    }
    std::erase_if(prompts, [](const PromptView& prompt) { return prompt.remaining == 0; });
    for (const PromptView& prompt : prompts) ASSERT_EQ(prompt.arrival, 0u);  // shorts: at once
    ASSERT_LE(++batches, 30'000 / 256 + 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, PromptBatchProperty, testing::Range<uint64_t>(1, 21));

}  // namespace
}  // namespace tandem::worker
