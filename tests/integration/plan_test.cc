// `tandem plan`: what it says of cards that are not there.
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

using nlohmann::json;
using testing::HasSubstr;

Completed Plan(std::vector<std::string> flags) {
  std::vector<std::string> args = {BinaryPath("tandem"), "plan"};
  args.insert(args.end(), flags.begin(), flags.end());
  return RunCommand(args, 100);
}

int Prompts() { return SanitizerSlowsBy() > 1 ? 30 : 60; }

json PlanOf(std::vector<std::string> flags) {
  const std::string prompts = std::to_string(Prompts());
  for (const char* flag : {"--json", "--num-prompts", prompts.c_str(), "--random-input-len", "512",
                           "--random-output-len", "64"}) {
    flags.push_back(flag);
  }
  const Completed plan = Plan(std::move(flags));
  EXPECT_EQ(plan.exit_code, 0) << plan.err;
  json out = json::parse(plan.out, nullptr, false);
  EXPECT_TRUE(out.is_object()) << plan.out << plan.err;
  return out;
}

const std::vector<std::string> kFourCards = {"--model", "Qwen2.5-7B", "--card", "rtx-4090d"};

std::vector<std::string> FourCards(std::vector<std::string> more) {
  more.insert(more.end(), kFourCards.begin(), kFourCards.end());
  return more;
}

json Split(const json& plan, const std::string& name) {
  for (const json& split : plan["splits"]) {
    if (split["split"] == name) return split;
  }
  ADD_FAILURE() << "no " << name << " in " << plan;
  return {};
}

TEST(PlanTest, MoreDecodeCardsMeanShorterGaps) {
  const json plan = PlanOf(FourCards({"--request-rate", "6", "--no-search"}));
  ASSERT_EQ(plan["splits"].size(), 4u);
  const double three = Split(plan, "1P3D")["p50_itl_ms"], two = Split(plan, "2P2D")["p50_itl_ms"],
               one = Split(plan, "3P1D")["p50_itl_ms"];
  EXPECT_LT(three, two);
  EXPECT_LT(two, one);
  EXPECT_LT(Split(plan, "3P1D")["p99_ttft_ms"], Split(plan, "1P3D")["p99_ttft_ms"]);
  for (const json& split : plan["splits"]) {
    EXPECT_EQ(split["failed"], 0);
    EXPECT_NEAR(split["request_throughput"].get<double>(), 6, 1.5) << split;
  }
}

TEST(PlanTest, FewerBytesOfWeightsMeanShorterGapsAndMoreRequests) {
  const json bf16 = PlanOf(FourCards({"--cards", "2", "--goodput", "ttft:1000", "tpot:40"}));
  const json int4 = PlanOf(
      FourCards({"--cards", "2", "--goodput", "ttft:1000", "tpot:40", "--quantisation", "int4"}));
  EXPECT_LT(int4["weight_bytes"], bf16["weight_bytes"]);
  EXPECT_GT(int4["kv_tokens"], bf16["kv_tokens"]);
  EXPECT_GE(Split(int4, "1P1D")["sustained_request_rate"],
            Split(bf16, "1P1D")["sustained_request_rate"]);
  EXPECT_THAT(bf16["why"].get<std::string>(), HasSubstr("sustains"));
  EXPECT_THAT(bf16["why"].get<std::string>(),
              HasSubstr("Run " + bf16["run"].get<std::string>() + ":"));
}

TEST(PlanTest, TheSameSeedGivesTheSamePlan) {
  const std::vector<std::string> flags = FourCards(
      {"--request-rate", "8", "--no-search", "--seed", "7", "--random-range-ratio", "0.5"});
  EXPECT_EQ(PlanOf(flags).dump(), PlanOf(flags).dump());
}

TEST(PlanTest, SharedBeginningsAreFoundInCaches) {
  const json plan = PlanOf(FourCards(
      {"--request-rate", "2", "--no-search", "--prefix-share", "0.75", "--num-prefixes", "2"}));
  const json split = Split(plan, "2P2D");
  // Two thirds of the prompts are measured, and 384 of their 512 tokens are shared.
  EXPECT_GT(split["total_cached_tokens"], Prompts() * 2 / 3 * 250);
  const json alone = PlanOf(FourCards({"--request-rate", "2", "--no-search"}));
  EXPECT_LT(split["p50_ttft_ms"], Split(alone, "2P2D")["p50_ttft_ms"]);
}

TEST(PlanTest, ReplaysATrace) {
  const Completed plan =
      Plan(FourCards({"--trace", SourcePath("tests/data/conversation_trace.jsonl"),
                      "--length-scale", "0.1", "--num-prompts", "50", "--no-search", "--json"}));
  ASSERT_EQ(plan.exit_code, 0) << plan.err;
  const json out = json::parse(plan.out);
  EXPECT_EQ(out["num_prompts"], 50);
  EXPECT_EQ(Split(out, "2P2D")["failed"], 0);
}

TEST(PlanTest, ABenchTakesThePlaceOfTheDataSheet) {
  const std::string bench = SourcePath("tests/data/bench/h200.json");
  const json plan = PlanOf({"--model", "Qwen2.5-7B", "--bench", bench, "--memory", "140GiB",
                            "--cards", "2", "--request-rate", "0.2", "--no-search"});
  EXPECT_THAT(plan["cost_model"].get<std::string>(), HasSubstr("fitted to 11 rows"));
  // A lone stream of that table takes 3.80 ms a token at 2,048 tokens.
  EXPECT_NEAR(Split(plan, "1P1D")["p50_itl_ms"].get<double>(), 3.7, 0.2);
}

TEST(PlanTest, SaysWithFiguresWhatDoesNotFit) {
  Completed plan = Plan({"--model", "Qwen2.5-32B", "--card", "rtx-4090d"});
  EXPECT_EQ(plan.exit_code, 1);
  EXPECT_THAT(plan.err, HasSubstr("weights take 65.5 GB as bf16"));
  EXPECT_THAT(plan.err, HasSubstr("--quantisation"));
  // Hopper makes pages of e4m3 bfloat16 in memory of their own.
  for (const auto& [card, steps] :
       {std::pair("h100", "1.8 GB"), std::pair("rtx-4090d", "1.5 GB")}) {
    plan = Plan(
        {"--model", "Qwen2.5-7B", "--card", card, "--memory", "17GB", "--kv-cache-dtype", "fp8"});
    EXPECT_EQ(plan.exit_code, 1);
    EXPECT_THAT(plan.err, HasSubstr(std::string("and its steps ") + steps));
  }
  plan = Plan(FourCards({"--random-input-len", "200000"}));
  EXPECT_EQ(plan.exit_code, 1);
  EXPECT_THAT(plan.err, HasSubstr("requests have up to 200512 tokens"));
  plan = Plan(FourCards({"--max-model-len", "131072", "--kv-cache-memory-bytes", "1GiB"}));
  EXPECT_EQ(plan.exit_code, 1);
  EXPECT_THAT(plan.err, HasSubstr("give at most"));
}

TEST(PlanTest, NamesTheFlagThatIsWrong) {
  for (const auto& [flags, message] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{}, "--model is needed"},
           {{"--model", "Qwen2.5-8B", "--card", "h100"}, "neither a directory nor a model"},
           {{"--model", "Qwen2.5-7B"}, "give --card"},
           {{"--model", "Qwen2.5-7B", "--card", "h10"}, "did you mean"},
           {{"--model", "Qwen2.5-7B", "--card", "cpu"}, "--bench"},
           {{"--model", "Qwen2.5-7B", "--card", "h100", "--bandwidth", "-1"},
            "--bandwidth must be above 0"},
           {{"--model", "Qwen2.5-7B", "--card", "h100", "--prefix-share", "1.5"}, "--prefix-share"},
           {{"--model", "Qwen2.5-7B", "--card", "h100", "--cards", "0"},
            "--cards must be in [1, 64]"},
           {{"--model", "Qwen2.5-7B", "--bench", "/nonexistent"}, "/nonexistent"}}) {
    const Completed plan = Plan(flags);
    EXPECT_NE(plan.exit_code, 0) << message;
    EXPECT_THAT(plan.err, HasSubstr(message));
  }
}

}  // namespace
}  // namespace tandem
