// What a benchmark sends and when: arrivals, traces, workloads.
#include <algorithm>
#include <cmath>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/bench/arrivals.h"
#include "cli/bench/trace.h"
#include "cli/bench/workload.h"
#include "common/base/status.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

struct Gaps {
  double mean = 0;
  double variation = 0;  // standard deviation over mean
};

Gaps GapsOf(const std::vector<double>& arrivals) {
  Gaps out;
  const auto count = static_cast<double>(arrivals.size() - 1);
  out.mean = (arrivals.back() - arrivals.front()) / count;
  double squares = 0;
  for (size_t i = 1; i < arrivals.size(); ++i) {
    squares += std::pow(arrivals[i] - arrivals[i - 1] - out.mean, 2);
  }
  out.variation = std::sqrt(squares / count) / out.mean;
  return out;
}

TEST(Arrivals, PoissonHasTheRateAndItsSpread) {
  const auto arrivals = MakeArrivals({.requests_per_second = 20, .seed = 3}, 20000);
  EXPECT_EQ(arrivals.front(), 0);
  EXPECT_TRUE(std::is_sorted(arrivals.begin(), arrivals.end()));
  EXPECT_NEAR(GapsOf(arrivals).mean, 0.05, 0.002);
  EXPECT_NEAR(GapsOf(arrivals).variation, 1, 0.05);
  EXPECT_EQ(arrivals, MakeArrivals({.requests_per_second = 20, .seed = 3}, 20000));
}

TEST(Arrivals, BurstinessIsTheShapeOfTheGaps) {
  const Gaps bursty = GapsOf(MakeArrivals({.requests_per_second = 5, .burstiness = 0.25}, 20000));
  EXPECT_NEAR(bursty.mean, 0.2, 0.01);
  EXPECT_NEAR(bursty.variation, 2, 0.1);
  EXPECT_NEAR(GapsOf(MakeArrivals({.requests_per_second = 5, .burstiness = 100}, 20000)).variation,
              0.1, 0.02);
}

TEST(Arrivals, ConstantDoesNotDrift) {
  const auto arrivals = MakeArrivals({.requests_per_second = 3, .constant = true}, 30001);
  EXPECT_DOUBLE_EQ(arrivals[1], 1 / 3.0);
  EXPECT_DOUBLE_EQ(arrivals.back(), 10000);
}

TEST(Trace, ReadsMooncakesLines) {
  const auto trace = ParseTrace(
      R"({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}

{"timestamp": 27.5, "input_length": 10, "output_length": 1, "hash_ids": [0], "more": 1})"
      "\n{\"timestamp\": broken",
      2);
  ASSERT_OK(trace);
  ASSERT_EQ(trace->size(), 2u);
  EXPECT_EQ(trace->at(1).timestamp_ms, 27.5);
  EXPECT_EQ(trace->at(0).input_length, 600);
  EXPECT_EQ(trace->at(0).output_length, 5);
  EXPECT_THAT(trace->at(0).hash_ids, ElementsAre(0, 7));
}

TEST(Trace, MistakesNameTheLineAndTheField) {
  const std::string good = R"({"timestamp":9,"input_length":1,"output_length":1,"hash_ids":[]})";
  const auto error = [&](const std::string& second) {
    return MessageOf(ParseTrace(good + "\n" + second, 100).status());
  };
  EXPECT_THAT(error("{"), HasSubstr("line 2: must be a JSON object"));
  EXPECT_THAT(error(R"({"input_length":1})"), HasSubstr("line 2: timestamp"));
  EXPECT_THAT(error(R"({"timestamp":9,"input_length":0,"output_length":1,"hash_ids":[]})"),
              HasSubstr("line 2: input_length"));
  EXPECT_THAT(error(R"({"timestamp":9,"input_length":1,"output_length":1e9,"hash_ids":[]})"),
              HasSubstr("line 2: output_length"));
  EXPECT_THAT(error(R"({"timestamp":9,"input_length":1,"output_length":1,"hash_ids":[-1]})"),
              HasSubstr("line 2: hash_ids"));
  EXPECT_THAT(error(R"({"timestamp":8,"input_length":1,"output_length":1,"hash_ids":[]})"),
              HasSubstr("line 2: timestamp goes back"));
}

std::vector<uint32_t> PromptOf(const Turn& turn) {
  std::vector<uint32_t> tokens;
  for (const Piece& piece : turn.pieces) AppendTokens(piece, 1, 1000, &tokens);
  return tokens;
}

size_t CommonPrefix(const Turn& a, const Turn& b) {
  const std::vector<uint32_t> x = PromptOf(a), y = PromptOf(b);
  const auto ends = std::mismatch(x.begin(), x.begin() + std::min(x.size(), y.size()), y.begin());
  return static_cast<size_t>(ends.first - x.begin());
}

TEST(Workload, EqualHashIdsGiveEqualBlocks) {
  const std::vector<TraceEntry> trace = {
      {0, 1300, 10, {0, 1, 2}}, {1000, 1100, 20, {0, 1, 3}}, {3000, 520, 30, {4, 1}}};
  const auto workload = TraceWorkload(trace, {.speed = 2});
  ASSERT_EQ(workload.size(), 3u);
  EXPECT_EQ(workload[1].at_s, 0.5);
  EXPECT_EQ(PromptOf(workload[0].turns[0]).size(), 1300u);
  EXPECT_EQ(workload[2].turns[0].output_tokens, 30);
  EXPECT_EQ(CommonPrefix(workload[0].turns[0], workload[1].turns[0]), 1024u);
  EXPECT_LT(CommonPrefix(workload[0].turns[0], workload[2].turns[0]), 4u);
}

TEST(Workload, ATraceScalesWithItsBlocks) {
  const auto workload =
      TraceWorkload({{0, 1300, 10, {0, 1, 2}}, {0, 1100, 2, {0, 1, 3}}}, {.length_scale = 0.25});
  EXPECT_EQ(PromptOf(workload[0].turns[0]).size(), 325u);
  EXPECT_EQ(CommonPrefix(workload[0].turns[0], workload[1].turns[0]), 256u);
  EXPECT_EQ(workload[1].turns[0].output_tokens, 1);
}

TEST(Workload, RandomPromptsShareNothingAndKeepTheirRange) {
  const auto workload = RandomWorkload(200, {.input = 100, .output = 40, .range_ratio = 0.5});
  std::set<std::vector<uint32_t>> prompts;
  double sum = 0;
  for (const Conversation& conversation : workload) {
    const auto prompt = PromptOf(conversation.turns[0]);
    EXPECT_GE(prompt.size(), 50u);
    EXPECT_LE(prompt.size(), 150u);
    for (const uint32_t id : prompt) EXPECT_LT(id, 1000u);
    sum += static_cast<double>(prompt.size());
    prompts.insert(prompt);
  }
  EXPECT_EQ(prompts.size(), 200u);
  EXPECT_NEAR(sum / 200, 100, 8);
  EXPECT_LT(CommonPrefix(workload[0].turns[0], workload[1].turns[0]), 4u);
}

TEST(Workload, PrefixesAreSharedByTurns) {
  const auto workload = RandomWorkload(4, {.input = 10}, 64, 2);
  EXPECT_EQ(PromptOf(workload[0].turns[0]).size(), 74u);
  EXPECT_LT(CommonPrefix(workload[0].turns[0], workload[1].turns[0]), 4u);
  EXPECT_GE(CommonPrefix(workload[0].turns[0], workload[2].turns[0]), 64u);
  EXPECT_LT(CommonPrefix(workload[0].turns[0], workload[2].turns[0]), 70u);
}

TEST(Workload, TwoTurnsCountTheirAnswers) {
  const auto workload = TwoTurnWorkload(3, 100, 20, {.output = 7});
  ASSERT_EQ(workload[2].turns.size(), 2u);
  EXPECT_EQ(workload[2].Length(), 100 + 7 + 20 + 7);
}

}  // namespace
}  // namespace tandem::cli
