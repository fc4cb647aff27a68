#include "decode_worker/step_cost.h"

#include <algorithm>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "decode_worker/scheduler.h"

namespace tandem::decode {
namespace {

StepWork Work(int decode_steps, int context, int chunk, int chunk_start) {
  StepWork work;
  for (int i = 0; i < decode_steps; ++i) work.Add(context, 1);
  if (chunk > 0) work.Add(chunk_start, chunk);
  return work;
}

// A device with rates of its own.
struct Device {
  double base = 5, per_step = 0.01, per_position = 1.3e-5, per_token = 0.019, per_pair = 3.6e-7;
  double noise = 0.03;
  std::mt19937 random{7};

  double Exact(const StepWork& work) const {
    return base + per_step * work.decode_steps +
           per_position * static_cast<double>(work.decode_positions) +
           per_token * work.chunk_tokens + per_pair * static_cast<double>(work.chunk_pairs);
  }
  absl::Duration Run(const StepWork& work) {
    std::normal_distribution<double> error(1, noise);
    return absl::Milliseconds(Exact(work) * error(random));
  }
};

TEST(StepWork, CountsWhatAttends) {
  StepWork work;
  work.Add(9, 1);    // attends to 10 positions
  work.Add(100, 3);  // to 101, 102 and 103
  EXPECT_EQ(work.decode_steps, 1);
  EXPECT_EQ(work.decode_positions, 10);
  EXPECT_EQ(work.chunk_tokens, 3);
  EXPECT_EQ(work.chunk_pairs, 306);
}

TEST(StepCost, FindsADevicesRates) {
  Device device;
  StepCost cost;
  std::uniform_int_distribution<int> steps(0, 64), context(100, 8000), chunk(0, 2000),
      start(0, 30000);
  for (int i = 0; i < 500; ++i) {
    const StepWork work = Work(steps(device.random), context(device.random), chunk(device.random),
                               start(device.random));
    cost.Observe(work, device.Run(work));
  }
  for (const StepWork& work : {Work(16, 2048, 0, 0), Work(16, 2048, 1000, 0),
                               Work(64, 500, 300, 20000), Work(0, 0, 2000, 5000)}) {
    EXPECT_NEAR(cost.Milliseconds(work), device.Exact(work), 0.1 * device.Exact(work));
  }
}

TEST(StepCost, FollowsADeviceThatBecomesSlower) {
  Device device;
  StepCost cost;
  const StepWork work = Work(16, 2048, 500, 4000);
  for (int i = 0; i < 1000; ++i) cost.Observe(work, device.Run(work));
  const double before = cost.Milliseconds(work);
  device.base *= 2, device.per_token *= 2;
  for (int i = 0; i < 600; ++i) cost.Observe(work, device.Run(work));
  EXPECT_NEAR(cost.Milliseconds(work), device.Exact(work), 0.1 * device.Exact(work));
  EXPECT_GT(cost.Milliseconds(work), 1.5 * before);
}

TEST(StepCost, TrustsNoChunkFarBeyondThoseSeen) {
  StepCost cost;
  EXPECT_EQ(cost.TrustedChunk(), StepCost::kFirstChunk);
  cost.Observe(Work(4, 100, 200, 0), absl::Milliseconds(10));
  EXPECT_EQ(cost.TrustedChunk(), 400);
  cost.Observe(Work(4, 100, 20, 0), absl::Milliseconds(10));
  EXPECT_EQ(cost.TrustedChunk(), 400);
}

// 16 sequences draw tokens while prompts of 32k tokens keep arriving: what the planner cuts, on a
// device that the planner does not know beforehand.
TEST(Pace, StepsKeepTheirTimeAndPromptsKeepMostOfTheirRate) {
  Device device;
  const Limits limits{16, 64, 8192};
  Pace pace{30, 1, {}};
  const int kPrompt = 32768;
  int prompt = 0;
  double total_ms = 0, tokens = 0;
  std::vector<double> gaps;
  for (int i = 0; i < 3000; ++i) {
    View view;
    view.free_blocks = 100000;
    for (int s = 0; s < 16; ++s) {
      view.sequences.push_back({SequencePhase::kRunnable, 2049 + i, 2048 + i, 1000});
    }
    view.sequences.push_back({SequencePhase::kRunnable, kPrompt, prompt, 3000});
    StepWork work;
    for (const ScheduledRun& run : NextBatch(view, limits, &pace).runs) {
      work.Add(view.sequences[static_cast<size_t>(run.sequence)].computed, run.num_tokens);
    }
    ASSERT_EQ(work.decode_steps, 16 + (kPrompt - prompt == 1));
    ASSERT_GE(work.chunk_tokens, std::min(kLeastChunk, kPrompt - prompt - 1));
    const absl::Duration took = device.Run(work);
    pace.cost.Observe(work, took);
    gaps.push_back(absl::ToDoubleMilliseconds(took));
    prompt = (prompt + work.chunk_tokens + (work.decode_steps - 16)) % kPrompt;
    if (i >= 100) total_ms += gaps.back(), tokens += work.chunk_tokens;
  }
  std::sort(gaps.begin(), gaps.end());
  EXPECT_LT(gaps[static_cast<size_t>(0.99 * static_cast<double>(gaps.size()))], 35);
  // Alone, the same prompts in chunks of 8192.
  double alone_ms = 0;
  for (int start = 0; start < kPrompt; start += 8192) {
    alone_ms += device.Exact(Work(0, 0, 8192, start));
  }
  EXPECT_GT(tokens / total_ms, 0.65 * kPrompt / alone_ms);
}

TEST(Pace, ABatchFillsItsTiles) {
  Pace pace{50, 256, {}};
  for (int i = 0; i < 50; ++i) {
    pace.cost.Observe(Work(3, 100, 0, 0), absl::Milliseconds(5));
    pace.cost.Observe(Work(3, 100, 900, 0), absl::Milliseconds(50));
  }
  View view;
  view.free_blocks = 1000;
  for (int i = 0; i < 3; ++i) view.sequences.push_back({SequencePhase::kRunnable, 100, 99, 7});
  view.sequences.push_back({SequencePhase::kRunnable, 10000, 0, 700});
  const auto chunk = [&] { return NextBatch(view, {16, 64, 8192}, &pace).runs.back().num_tokens; };
  EXPECT_EQ(chunk(), 768 - 3);
  // What ends a prompt is not held back for a full tile.
  view.sequences.back() = {SequencePhase::kRunnable, 10000, 9200, 700};
  EXPECT_EQ(chunk(), 800);
  // Less than a tile is better than nothing.
  view.sequences.back() = {SequencePhase::kRunnable, 10000, 0, 700};
  pace.target_ms = 10;
  EXPECT_GT(chunk(), kLeastChunk);
  EXPECT_LT(chunk(), 253);
}

TEST(Pace, WithoutDecodeStepsTheBudgetIsWhole) {
  Pace pace{1, 1, {}};
  pace.cost.Observe(Work(0, 0, 4096, 0), absl::Milliseconds(100));
  View view;
  view.free_blocks = 1000;
  view.sequences.push_back({SequencePhase::kRunnable, 10000, 0, 700});
  const Plan alone = NextBatch(view, {16, 64, 8192}, &pace);
  ASSERT_EQ(alone.runs.size(), 1u);
  EXPECT_EQ(alone.runs[0].num_tokens, 8192);
  view.sequences.push_back({SequencePhase::kRunnable, 100, 99, 7});
  const Plan beside = NextBatch(view, {16, 64, 8192}, &pace);
  ASSERT_EQ(beside.runs.size(), 2u);
  EXPECT_EQ(beside.runs[1].num_tokens, kLeastChunk);
}

}  // namespace
}  // namespace tandem::decode
