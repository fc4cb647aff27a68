#include "simulation/serving.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "simulation/catalogue.h"
#include "tests/support/paths.h"

namespace tandem::simulation {
namespace {

Traffic Steady(int count, double per_second, int prompt, int answer) {
  Traffic traffic;
  for (int i = 0; i < count; ++i) {
    traffic.requests.push_back({absl::Seconds(i / per_second), prompt, answer});
  }
  traffic.vocab_size = 10000;
  traffic.prompt = [prompt](size_t i) {
    std::vector<int32_t> tokens(static_cast<size_t>(prompt));
    std::iota(tokens.begin(), tokens.end(), static_cast<int32_t>(i * 17 % 5000));
    return tokens;
  };
  return traffic;
}

WorkerPlan Worker() {
  WorkerPlan worker;
  worker.num_blocks = 6000;
  worker.max_model_len = 4096;
  return worker;
}

class Serving : public testing::Test {
 protected:
  Outcome Run(const Split& split, const Traffic& traffic) {
    return Serve(split, Worker(), cost_, model_, traffic, {0, traffic.requests.size()});
  }
  const CostModel cost_{*FindCard("rtx-4090d"), MeasuredDerates()};
  const ModelWork model_{FindModel("Qwen2.5-7B")->config, *FindQuantisation("bf16")};
};

TEST(Split, EveryOneOfTheCards) {
  std::string names;
  for (const Split& split : SplitsOf(4)) names += split.Name() + " ";
  EXPECT_EQ(names, "1P3D 2P2D 3P1D unified x4 ");
  EXPECT_EQ(SplitsOf(1).size(), 1u);
}

TEST_F(Serving, ALoneRequestTakesWhatItsStepsTake) {
  const Outcome outcome = Run({1, 1, 0}, Steady(1, 1, 2048, 32));
  const Answer& answer = outcome.answers[0];
  EXPECT_OK(answer.status);
  ASSERT_EQ(answer.arrivals.size(), 32u);
  StepShape prompt, step;
  prompt.Add(0, 2048, true);
  step.Add(2060, 1, true);
  const double ttft = absl::ToDoubleMilliseconds(answer.arrivals[0]);
  EXPECT_NEAR(ttft, cost_.Seconds(model_, prompt) * 1e3, 1);
  const double itl = absl::ToDoubleMilliseconds(answer.arrivals[31] - answer.arrivals[2]) / 29;
  EXPECT_NEAR(itl, cost_.Seconds(model_, step) * 1e3, 0.2);
  // One layer of 28 of its last chunk crosses after the first token, and a few hops.
  EXPECT_LT(answer.arrivals[1] - answer.arrivals[0], absl::Milliseconds(itl + 2));
}

TEST_F(Serving, ASlowLinkDelaysTheSecondToken) {
  WorkerPlan worker = Worker();
  worker.link_bytes_per_second = 1e8;
  const Traffic traffic = Steady(1, 1, 2048, 8);
  const Outcome outcome = Serve({1, 1, 0}, worker, cost_, model_, traffic, {0, 1});
  const Answer& answer = outcome.answers[0];
  // 117 MB take 1.17 s, most of it after the prefill of 0.27 s.
  const absl::Duration gap = answer.arrivals[1] - answer.arrivals[0];
  EXPECT_GT(gap, absl::Milliseconds(850));
  EXPECT_LT(gap, absl::Milliseconds(1250));
}

// Two unified workers of one thread: alone on two cores, and sharing one with the other.
TEST_F(Serving, WorkersOfOneHostShareItsCores) {
  const Traffic traffic = Steady(2, 1000, 64, 64);
  const auto itl = [&](const Host& host) {
    WorkerPlan worker = Worker();
    worker.host = host;
    const Outcome outcome = Serve({0, 0, 2}, worker, cost_, model_, traffic, {0, 2});
    const std::vector<absl::Duration>& arrivals = outcome.answers[0].arrivals;
    return (arrivals[40] - arrivals[10]) / 30;
  };
  const absl::Duration alone = itl({});
  EXPECT_EQ(itl({.cores = 2, .threads = 1}), alone);
  EXPECT_NEAR(absl::FDivDuration(itl({.cores = 1, .threads = 1}), alone), 2, 0.1);
  EXPECT_NEAR(absl::FDivDuration(itl({.cores = 2, .threads = 2}), alone), 2, 0.1);
  // Cores enough, and memory that both together would read 1.5 times as fast as it is read.
  const double host_reads = 2 * cost_.ReadBytesPerSecond() / 1.5;
  const double slower = absl::FDivDuration(
      itl({.cores = 2, .threads = 1, .read_bytes_per_second = host_reads}), alone);
  EXPECT_GT(slower, 1.35);
  EXPECT_LT(slower, 1.55);
}

TEST_F(Serving, TheSameTrafficGivesTheSameAnswers) {
  const Traffic traffic = Steady(40, 4, 1024, 64);
  const Outcome a = Run({2, 2, 0}, traffic), b = Run({2, 2, 0}, traffic);
  for (size_t i = 0; i < a.answers.size(); ++i) {
    EXPECT_EQ(a.answers[i].arrivals, b.answers[i].arrivals) << i;
  }
}

TEST_F(Serving, MoreDecodeCardsGiveShorterGaps) {
  const Traffic traffic = Steady(120, 4, 512, 256);
  const auto gap = [&](const Split& split) {
    double sum = 0;
    const absl::Time start = absl::Now();
    const Outcome outcome = Run(split, traffic);
    for (const Answer& answer : outcome.answers) {
      EXPECT_OK(answer.status);
      sum += absl::ToDoubleMilliseconds(answer.arrivals.back() - answer.arrivals.front()) / 255;
    }
    std::printf("  %s: mean gap %.2f ms, %.1f s simulated in %.2f s\n", split.Name().c_str(),
                sum / 120, absl::ToDoubleSeconds(outcome.simulated),
                absl::ToDoubleSeconds(absl::Now() - start));
    return sum / 120;
  };
  const double three = gap({1, 3, 0}), two = gap({2, 2, 0}), one = gap({3, 1, 0});
  EXPECT_LT(three, two);
  EXPECT_LT(two, one);
}

}  // namespace
}  // namespace tandem::simulation
