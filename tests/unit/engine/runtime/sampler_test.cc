#include "engine/runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/kernels/cpu/sample.h"
#include "engine/kernels/philox.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// What the runner does with one row of logits that the next token of a sequence is drawn from.
absl::StatusOr<TokenLogprob> SampleToken(const std::vector<float>& logits,
                                         const std::vector<int32_t>& tokens, size_t prompt_length,
                                         const SamplingParams& params,
                                         const std::vector<int32_t>& draft = {}) {
  BatchItem item;
  item.tokens = tokens;
  item.draft = draft;
  item.prompt_length = static_cast<int>(prompt_length);
  std::vector<int32_t> token_lists(MaxListTokens(params, item));
  TokenLists lists{token_lists.data()};
  const DrawSpec spec = MakeDrawSpec(params, item, draft.size(), &lists);
  static DrawScratch scratch;
  return ReadDraw(
      DrawRow(logits.data(), logits.size(), spec, token_lists.data(), nullptr, &scratch),
      static_cast<int>(logits.size()));
}

int32_t Sample(const std::vector<float>& logits, const SamplingParams& params,
               const std::vector<int32_t>& tokens, size_t prompt_length) {
  const auto out = SampleToken(logits, tokens, prompt_length, params);
  EXPECT_OK(out);
  return out.ok() ? out->token : -1;
}

// Probability of every token, in float64 and without any shortcut.
std::vector<double> ExactDistribution(const std::vector<float>& logits, const SamplingParams& p,
                                      const std::vector<int32_t>& tokens, size_t prompt_length) {
  const size_t n = logits.size();
  std::vector<double> l(logits.begin(), logits.end());
  std::vector<int> outputs(n);
  std::vector<bool> seen(n);
  for (size_t i = 0; i < tokens.size(); ++i) {
    seen[static_cast<size_t>(tokens[i])] = true;
    if (i >= prompt_length) ++outputs[static_cast<size_t>(tokens[i])];
  }
  for (size_t i = 0; i < n; ++i) {
    if (seen[i]) l[i] = l[i] > 0 ? l[i] / p.repetition_penalty : l[i] * p.repetition_penalty;
    l[i] -= outputs[i] * static_cast<double>(p.frequency_penalty);
    if (outputs[i] > 0) l[i] -= p.presence_penalty;
    l[i] /= p.temperature;
  }
  const double top = *std::max_element(l.begin(), l.end());
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return l[a] > l[b]; });
  std::vector<double> weight(n);
  for (size_t i = 0; i < n; ++i) {
    weight[i] = std::exp(l[i] - top);
    if (weight[i] < static_cast<double>(p.min_p)) weight[i] = 0;
    const bool beyond_k = p.top_k > 0 && static_cast<size_t>(p.top_k) < n &&
                          l[i] < l[order[static_cast<size_t>(p.top_k) - 1]];
    if (beyond_k) weight[i] = 0;
  }
  double total = std::accumulate(weight.begin(), weight.end(), 0.0), before = 0;
  for (const size_t i : order) {
    const double mine = weight[i];
    if (before >= static_cast<double>(p.top_p) * total && before > 0) weight[i] = 0;
    before += mine;
  }
  total = std::accumulate(weight.begin(), weight.end(), 0.0);
  for (double& w : weight) w /= total;
  return weight;
}

// Draws often with running positions and compares frequencies with the exact probabilities.
void CheckDistribution(SamplingParams params, size_t vocab, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(vocab);
  for (float& l : logits) l = normal(random);
  std::vector<int32_t> history = {1, 2, 2, 5, 5, 5};
  const size_t prompt_length = 2;
  const std::vector<double> exact = ExactDistribution(logits, params, history, prompt_length);
  constexpr int kDraws = 20000;
  std::vector<int> counts(vocab);
  for (int i = 0; i < kDraws; ++i) {
    params.seed = 1000 + static_cast<uint64_t>(i);
    ++counts[static_cast<size_t>(Sample(logits, params, history, prompt_length))];
  }
  for (size_t t = 0; t < vocab; ++t) {
    const double expected = exact[t] * kDraws;
    if (exact[t] == 0) {
      EXPECT_EQ(counts[t], 0) << "token " << t;
    } else {  // five standard deviations of a binomial
      EXPECT_NEAR(counts[t], expected, 5 * std::sqrt(expected) + 1) << "token " << t;
    }
  }
}

// What two positions draw where the first one's token was drafted, over many seeds: each pair as
// often as the model's own distributions say (chi-square), whether the draft was right or wrong.
TEST(SamplerTest, ADraftLeavesTheDistributionAsItIs) {
  constexpr size_t kVocab = 8;
  constexpr int kDraws = 20000;
  std::mt19937 random(11);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> first(kVocab);
  std::vector<std::vector<float>> second(kVocab, first);  // by the token before
  for (float& l : first) l = normal(random);
  for (auto& logits : second) {
    for (float& l : logits) l = normal(random);
  }
  SamplingParams params;
  params.temperature = 1.2f;
  params.presence_penalty = 0.5f;
  const std::vector<int32_t> history = {1, 2, 2};
  for (const int32_t drafted : {0, 3, 5}) {
    std::vector<std::vector<int>> counts(kVocab, std::vector<int>(kVocab));
    for (int i = 0; i < kDraws; ++i) {
      params.seed = static_cast<uint64_t>(i);
      const auto one = SampleToken(first, history, 2, params);
      ASSERT_OK(one);
      // In the same step if the draft was right, else in the next one.
      std::vector<int32_t> known = history;
      if (one->token != drafted) known.push_back(one->token);
      const std::vector<int32_t> draft =
          one->token == drafted ? std::vector<int32_t>{drafted} : std::vector<int32_t>{};
      const auto two =
          SampleToken(second[static_cast<size_t>(one->token)], known, 2, params, draft);
      ASSERT_OK(two);
      ++counts[static_cast<size_t>(one->token)][static_cast<size_t>(two->token)];
    }
    const std::vector<double> p = ExactDistribution(first, params, history, 2);
    double chi_square = 0;
    int cells = 0;
    for (size_t a = 0; a < kVocab; ++a) {
      std::vector<int32_t> known = history;
      known.push_back(static_cast<int32_t>(a));
      const std::vector<double> q = ExactDistribution(second[a], params, known, 2);
      for (size_t b = 0; b < kVocab; ++b) {
        const double expected = p[a] * q[b] * kDraws;
        if (expected < 5) continue;  // too few for the test
        chi_square += (counts[a][b] - expected) * (counts[a][b] - expected) / expected;
        ++cells;
      }
    }
    EXPECT_GT(cells, 40);
    // Five standard deviations above its mean.
    EXPECT_LT(chi_square, cells + 5 * std::sqrt(2.0 * cells)) << "draft " << drafted;
  }
}

TEST(PhiloxTest, KnownAnswers) {  // of the reference implementation, Random123
  EXPECT_THAT(Philox4x32({0, 0, 0, 0}, {0, 0}),
              ElementsAre(0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  EXPECT_THAT(Philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
              ElementsAre(0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu));
  EXPECT_THAT(
      Philox4x32({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u}),
      ElementsAre(0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u));
}

TEST(PhiloxTest, UniformIsAFunctionOfSeedAndPosition) {
  EXPECT_EQ(UniformAt(1, 2), UniformAt(1, 2));
  EXPECT_NE(UniformAt(1, 2), UniformAt(1, 3));
  EXPECT_NE(UniformAt(1, 2), UniformAt(uint64_t{1} << 32 | 1, 2));
  double sum = 0;
  for (uint64_t i = 0; i < 10000; ++i) {
    const double u = UniformAt(7, i);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += u;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 0.015);
}

TEST(SamplerTest, DistributionsMatchAStraightforwardOne) {
  SamplingParams plain;
  CheckDistribution(plain, 12, 1);
  SamplingParams warm;
  warm.temperature = 1.7f;
  warm.top_k = 5;
  CheckDistribution(warm, 12, 2);
  SamplingParams nucleus;
  nucleus.temperature = 0.7f;
  nucleus.top_p = 0.8f;
  CheckDistribution(nucleus, 12, 3);
  SamplingParams minimum;
  minimum.min_p = 0.1f;
  minimum.top_p = 0.95f;
  CheckDistribution(minimum, 12, 4);
  SamplingParams penalties;
  penalties.repetition_penalty = 1.3f;
  penalties.presence_penalty = 0.5f;
  penalties.frequency_penalty = 0.25f;
  CheckDistribution(penalties, 12, 5);
  SamplingParams all = penalties;
  all.temperature = 0.9f;
  all.top_k = 8;
  all.top_p = 0.9f;
  all.min_p = 0.01f;
  CheckDistribution(all, 12, 6);
}

// A nucleus wider than the part that is sorted first.
TEST(SamplerTest, WideNucleusMatches) {
  SamplingParams params;
  params.top_p = 0.9f;
  CheckDistribution(params, 2000, 7);
}

TEST(SamplerTest, GreedyTakesTheLowestOfEquals) {
  SamplingParams greedy;
  greedy.temperature = 0;
  EXPECT_EQ(Sample({1, 3, 3, 2}, greedy, {0}, 1), 1);
  greedy.temperature = 1e-6f;
  EXPECT_EQ(Sample({1, 3, 3, 2}, greedy, {0}, 1), 1);
}

TEST(SamplerTest, FiltersAtTheirEnds) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SamplingParams p;
    p.seed = seed;
    p.top_k = 1;
    EXPECT_EQ(Sample({0, 2, 1}, p, {0}, 1), 1);
    p.top_k = 0;
    p.top_p = 1e-9f;  // keeps at least one
    EXPECT_EQ(Sample({0, 2, 1}, p, {0}, 1), 1);
    p.top_p = 1;
    p.min_p = 1;  // only what equals the best
    EXPECT_EQ(Sample({0, 2, 1}, p, {0}, 1), 1);
    p.min_p = 0;
    p.top_k = 2;  // a tie at the edge stays whole, as many as there are
    EXPECT_NE(Sample({2, 2, 2, -1}, p, {0}, 1), 3);
    p.top_k = 1000;
    p.temperature = 1e-4f;  // weights of all others underflow
    EXPECT_EQ(Sample({0, 2, 1}, p, {0}, 1), 1);
  }
}

TEST(SamplerTest, RepetitionCountsThePromptPresenceDoesNot) {
  SamplingParams p;
  p.temperature = 0;
  const std::vector<float> logits = {1.0f, 0.9f, -1.0f};
  p.repetition_penalty = 2;
  EXPECT_EQ(Sample(logits, p, {0}, 1), 1);
  p.repetition_penalty = 1;
  p.presence_penalty = 1;
  EXPECT_EQ(Sample(logits, p, {0}, 1), 0);     // in the prompt
  EXPECT_EQ(Sample(logits, p, {2, 0}, 1), 1);  // in the output
  p.presence_penalty = 0;
  p.frequency_penalty = 0.06f;
  EXPECT_EQ(Sample(logits, p, {2, 0}, 1), 0);     // once: 0.94
  EXPECT_EQ(Sample(logits, p, {2, 0, 0}, 1), 1);  // twice: 0.88
}

TEST(SamplerTest, MinTokensMasksEndsUntilReached) {
  SamplingParams p;
  p.temperature = 0;
  p.min_tokens = 2;
  p.eos_token_ids = {0};
  p.stop_token_ids = {1};
  const std::vector<float> logits = {3, 2, 1};
  EXPECT_EQ(Sample(logits, p, {2}, 1), 2);
  EXPECT_EQ(Sample(logits, p, {2, 2}, 1), 2);
  EXPECT_EQ(Sample(logits, p, {2, 2, 2}, 1), 0);
  p.ignore_eos = true;  // then it is a token like any other
  EXPECT_EQ(Sample(logits, p, {2}, 1), 0);
}

TEST(SamplerTest, LogprobsAreTheModelsOwn) {
  SamplingParams p;
  p.temperature = 0;
  p.repetition_penalty = 10;
  p.logprobs = 2;
  const std::vector<float> logits = {2, 1, 0};
  const std::vector<int32_t> tokens = {0};
  auto out = SampleToken(logits, tokens, 1, p);
  ASSERT_OK(out);
  const double sum = std::log(std::exp(2.0) + std::exp(1.0) + 1);
  EXPECT_EQ(out->token, 1);  // 0 is penalised
  EXPECT_NEAR(out->logprob, 1 - sum, 1e-6);
  ASSERT_EQ(out->top.size(), 2u);
  EXPECT_EQ(out->top[0].token, 0);
  EXPECT_NEAR(out->top[0].logprob, 2 - sum, 1e-6);
  p.logprobs = 0;
  out = SampleToken(logits, tokens, 1, p);
  ASSERT_OK(out);
  EXPECT_TRUE(out->top.empty());
  EXPECT_NEAR(out->logprob, 1 - sum, 1e-6);
}

TEST(SamplerTest, NoPenaltyInRangeMakesInfinity) {
  SamplingParams p;
  p.repetition_penalty = 1e-38f;
  p.min_tokens = 5;
  p.eos_token_ids = {1};
  for (const float temperature : {0.0f, 1.0f}) {
    p.temperature = temperature;
    EXPECT_EQ(Sample({20, 30, 25}, p, {0, 1}, 2), 0);
  }
}

TEST(SamplerTest, BrokenLogitsAreAnErrorNotAToken) {
  const std::vector<int32_t> tokens = {0};
  SamplingParams p;
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  for (const float temperature : {0.0f, 1.0f}) {
    p.temperature = temperature;
    auto out = SampleToken({1, nan, 2}, tokens, 1, p);
    EXPECT_EQ(out.status().code(), absl::StatusCode::kInternal);
    EXPECT_THAT(out.status().ToString(), HasSubstr("NaN"));
    out = SampleToken({1, infinity}, tokens, 1, p);
    EXPECT_EQ(out.status().code(), absl::StatusCode::kInternal);
  }
  p.min_tokens = 5;
  p.stop_token_ids = {0, 1};
  const auto out = SampleToken({1, 2}, tokens, 1, p);
  EXPECT_THAT(out.status().ToString(), HasSubstr("masked"));
  DrawScratch scratch;
  DrawSpec beyond;
  beyond.scored = 2;
  const std::vector<float> logits = {1, 2};
  EXPECT_EQ(DrawRow(logits.data(), 2, beyond, nullptr, nullptr, &scratch).status,
            DrawStatus::kOutOfVocabulary);
}

}  // namespace
}  // namespace tandem::engine
