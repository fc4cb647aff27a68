#include "simulation/cost_model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/file.h"
#include "simulation/catalogue.h"
#include "tests/support/paths.h"

namespace tandem::simulation {
namespace {

const ModelConfig& Qwen7B() { return FindModel("Qwen2.5-7B")->config; }
ModelWork Work(const char* quantisation) {
  return ModelWork(Qwen7B(), *FindQuantisation(quantisation));
}

StepShape Decode(int rows, int context) {
  StepShape step;
  for (int i = 0; i < rows; ++i) step.Add(context, 1, true);
  return step;
}

StepShape Prompt(int tokens) {
  StepShape step;
  step.Add(0, tokens, true);
  return step;
}

Bench H200() {
  const absl::StatusOr<std::string> text = ReadFile(SourcePath("tests/data/bench/h200.json"));
  EXPECT_TRUE(text.ok()) << text.status();
  absl::StatusOr<Bench> bench = ParseBench(*text);
  EXPECT_TRUE(bench.ok()) << bench.status();
  return *std::move(bench);
}

TEST(ModelWork, WeighsAsPublishedCheckpointsDo) {
  EXPECT_EQ(Work("bf16").WeightBytes(), 2 * Qwen7B().NumParameters());
  // Qwen2.5-7B-Instruct-AWQ is 5.57 GB, -GPTQ-Int8 8.8 GB.
  EXPECT_NEAR(static_cast<double>(Work("int4").WeightBytes()), 5.57e9, 0.1e9);
  EXPECT_NEAR(static_cast<double>(Work("int8").WeightBytes()), 8.75e9, 0.1e9);
  EXPECT_EQ(Work("int4").KvBytesPerToken(), 57344);
  EXPECT_EQ(Work("fp32").KvBytesPerToken(), 114688);
  const ModelWork fp8(Qwen7B(), *FindQuantisation("bf16"), DType::kFloat8E4M3);
  EXPECT_EQ(fp8.KvBytesPerToken(), 28672);
  EXPECT_EQ(fp8.WeightBytes(), Work("bf16").WeightBytes());
}

TEST(CostModel, RooflineIsBytesOfADecodeStepAndFlopsOfAPrompt) {
  const Card card{"", 1e12, 100e12, 0, 0};
  const CostModel model(card, {});
  // 14.14 GB of weights less the embedding, and a context of 2,048 tokens; the products of one row
  // add 0.14 ms.
  EXPECT_NEAR(model.Seconds(Work("bf16"), Decode(1, 2047)), 14.14e-3 + 0.117e-3 + 0.141e-3,
              0.01e-3);
  EXPECT_NEAR(model.Seconds(Work("int4"), Decode(1, 2047)), 4.48e-3 + 0.117e-3 + 0.141e-3, 0.01e-3);
  // 2 x 6.53e9 x 2,048 FLOP, the attention of 2 million pairs, and the weights once.
  EXPECT_NEAR(model.Seconds(Work("bf16"), Prompt(2048)), 0.2673 + 0.0084 + 0.0141, 0.5e-3);
}

TEST(CostModel, GrowsWithEverythingThatAStepComputes) {
  const CostModel model(*FindCard("rtx-4090d"), MeasuredDerates());
  const ModelWork work = Work("bf16");
  EXPECT_LT(model.Seconds(work, Decode(1, 2048)), model.Seconds(work, Decode(16, 2048)));
  EXPECT_LT(model.Seconds(work, Decode(16, 2048)), model.Seconds(work, Decode(16, 8192)));
  EXPECT_LT(model.Seconds(work, Prompt(512)), model.Seconds(work, Prompt(1024)));
  StepShape continued;
  continued.Add(4096, 512, true);
  EXPECT_LT(model.Seconds(work, Prompt(512)), model.Seconds(work, continued));
  // A chunk that is not a prompt's last reads no head.
  StepShape chunk;
  chunk.Add(0, 512, false);
  EXPECT_LT(model.Seconds(work, chunk), model.Seconds(work, Prompt(512)));
}

TEST(CostModel, AFitFindsTheCardThatMadeTheRows) {
  const Card truth{"", 3e12, 500e12, 0, 0};
  const Derates kept{.read = 0.8, .product = 0.7, .attention = 0.5, .fixed_seconds = 0.4e-3};
  const CostModel real(truth, kept);
  Bench bench = H200();
  const ModelWork work(bench.model, bench.quantisation);
  for (BenchRow& row : bench.rows) row.seconds = real.Seconds(work, row);
  const CostModel prior(truth, {.fixed_seconds = 0.1e-3});
  const CostModel fitted = CostModel::Fit(bench, prior);
  for (const BenchRow& row : bench.rows) {
    EXPECT_NEAR(fitted.Seconds(work, row) / row.seconds, 1, 0.01) << row.name;
  }
  EXPECT_NEAR(fitted.SharesOf(truth).product, 0.7, 0.02);
  // Reading the weights and the fixed part look alike where every row reads the same weights.
  EXPECT_NEAR(fitted.SharesOf(truth).read, 0.8, 0.05);
}

TEST(CostModel, AFitLeavesAloneWhatItsRowsSayNothingOf) {
  Bench bench = H200();
  std::erase_if(bench.rows, [](const BenchRow& row) { return row.tokens > 1; });
  const Card& card = *FindCard("h200");
  const CostModel prior(card, {1, 1, 0.5, 0.1e-3});
  const CostModel fitted = CostModel::Fit(bench, prior);
  EXPECT_DOUBLE_EQ(fitted.SharesOf(card).attention, 0.5);
  EXPECT_LT(fitted.SharesOf(card).read, 1);
}

// The rows of docs/performance.md: what `tandem plan` derates other cards by.
TEST(CostModel, AFitReproducesTheTableOfAnH200) {
  const Bench bench = H200();
  const Card& card = *FindCard("h200");
  const ModelWork work(bench.model, bench.quantisation);
  const CostModel fitted = CostModel::Fit(bench, CostModel(card, {1, 1, 1, 0.1e-3}));
  double worst = 0;
  for (const BenchRow& row : bench.rows) {
    const double error = fitted.Seconds(work, row) / row.seconds - 1;
    std::printf("  %-28s %9.2f ms, fitted %9.2f (%+.1f %%)\n", row.name.c_str(), row.seconds * 1e3,
                fitted.Seconds(work, row) * 1e3, error * 1e2);
    worst = std::max(worst, std::abs(error));
  }
  EXPECT_LT(worst, 0.10);
  const Derates kept = fitted.SharesOf(card), used = MeasuredDerates();
  std::printf("  read %.3f, product %.3f, attention %.3f, fixed %.2f ms\n", kept.read, kept.product,
              kept.attention, kept.fixed_seconds * 1e3);
  EXPECT_NEAR(used.read, kept.read, 0.01);
  EXPECT_NEAR(used.product, kept.product, 0.01);
  EXPECT_NEAR(used.attention, kept.attention, 0.01);
  EXPECT_NEAR(used.fixed_seconds, kept.fixed_seconds, 0.05e-3);
}

TEST(SlowdownOf, GrowsOnceCoresOrMemoryDoNotDoForAll) {
  const Host host = {.cores = 4, .threads = 2, .read_bytes_per_second = 30e9};
  const auto of = [&](int workers) { return SlowdownOf(host, workers, 12e9); };
  EXPECT_EQ(of(1).compute, 1);
  EXPECT_EQ(of(1).read, 1);
  EXPECT_EQ(of(2).compute, 1);
  EXPECT_EQ(of(2).read, 1);
  EXPECT_DOUBLE_EQ(of(3).compute, 1.5);
  EXPECT_DOUBLE_EQ(of(3).read, 1.5);
  EXPECT_DOUBLE_EQ(SlowdownOf(host, 2, 20e9).read, 40.0 / 30);
  EXPECT_EQ(SlowdownOf({}, 9, 20e9).compute, 1);
}

TEST(ParseBench, NamesWhatIsWrong) {
  const auto message = [](const std::string& text) {
    return std::string(ParseBench(text).status().message());
  };
  EXPECT_THAT(message("[]"), testing::HasSubstr("JSON object"));
  EXPECT_THAT(message("{}"), testing::HasSubstr("read_bytes_per_second"));
  EXPECT_THAT(message(R"({"read_bytes_per_second": 1e9, "matmul_flops": 1e9})"),
              testing::HasSubstr("model"));
  std::string text = *ReadFile(SourcePath("tests/data/bench/h200.json"));
  text.replace(text.find("\"start\": 2068"), 13, "\"start\": -2  ");
  EXPECT_THAT(message(text), testing::HasSubstr("rows[0]: start must be an integer >= 0"));
}

}  // namespace
}  // namespace tandem::simulation
