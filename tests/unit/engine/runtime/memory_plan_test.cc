#include "engine/runtime/memory_plan.h"

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr size_t kMiB = size_t{1} << 20, kGiB = size_t{1} << 30;

// Qwen1.5-7B: all of its 32 heads of 128 have keys and values of their own in each of 32 layers.
KvLayout Qwen15() { return {32, 32, 128, 16, DType::kBFloat16}; }

// Qwen2.5-7B on an idle card of 24 GB.
KvLayout Qwen25() { return {28, 4, 128, 16, DType::kBFloat16}; }
DeviceMemory Card() {
  DeviceMemory memory;
  memory.total = 24 * kGiB;
  memory.used_before = 500 * kMiB;
  memory.weights = 14500 * kMiB;
  memory.workspace = 1 * kGiB;
  return memory;
}

std::string ErrorOf(const absl::StatusOr<PoolPlan>& plan) { return plan.status().ToString(); }

TEST(MemoryPlanTest, Sizes) {
  EXPECT_EQ(Qwen15().BytesPerToken(), 512u * 1024);
  EXPECT_EQ(Qwen25().BytesPerToken(), 57344u);
}

TEST(MemoryPlanTest, ThePoolIsWhatTheOthersLeaveOfTheUtilization) {
  const auto plan = PlanDevicePool(Qwen25(), Card(), 0, 131072);
  ASSERT_OK(plan);
  const size_t left = static_cast<size_t>(0.9 * 24 * kGiB) - (14500 + 1024) * kMiB;
  EXPECT_EQ(plan->num_blocks, static_cast<int>(left / (57344 * 16)));
  EXPECT_EQ(plan->max_model_len, plan->num_blocks * 16);
  const auto shorter = PlanDevicePool(Qwen25(), Card(), 4096, 131072);
  ASSERT_OK(shorter);
  EXPECT_EQ(shorter->num_blocks, plan->num_blocks);
  EXPECT_EQ(shorter->max_model_len, 4096);
  // Never longer than the model's positions reach.
  const auto limited = PlanDevicePool(Qwen25(), Card(), 0, 32768);
  ASSERT_OK(limited);
  EXPECT_EQ(limited->max_model_len, 32768);
  EXPECT_THAT(ErrorOf(PlanDevicePool(Qwen25(), Card(), 32769, 32768)),
              HasSubstr("exceeds what the model's positions allow; the largest is 32768"));
}

// "32768 > 7344": 512 KiB a token leave a card of 24 GB with 7344 of them.
TEST(MemoryPlanTest, ALengthThatDoesNotFitIsRefusedWithTheLargestThatDoes) {
  DeviceMemory memory = Card();
  memory.utilization = 1;
  memory.workspace = memory.total - memory.used_before - memory.weights - size_t{7344} * 512 * 1024;
  const auto plan = PlanDevicePool(Qwen15(), memory, 32768, 32768);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(ErrorOf(plan),
              AllOf(HasSubstr("--max-model-len=32768 does not fit"), HasSubstr("512 KiB a token"),
                    HasSubstr("the largest that would fit is 7344"),
                    HasSubstr("lower --max-num-batched-tokens")));
  const auto fits = PlanDevicePool(Qwen15(), memory, 7344, 32768);
  ASSERT_OK(fits);
  EXPECT_EQ(fits->num_blocks, 7344 / 16);
  EXPECT_FALSE(PlanDevicePool(Qwen15(), memory, 7345, 32768).ok());
  const auto as_long_as_fits = PlanDevicePool(Qwen15(), memory, 0, 32768);
  ASSERT_OK(as_long_as_fits);
  EXPECT_EQ(as_long_as_fits->max_model_len, 7344);
}

TEST(MemoryPlanTest, TheUtilizationThatIsAdvisedHelps) {
  DeviceMemory memory = Card();
  memory.utilization = 0.7;
  // 14500 MiB, 1 GiB and 3.5 GiB are 0.778 of the card.
  const std::string error = ErrorOf(PlanDevicePool(Qwen25(), memory, 65536, 131072));
  EXPECT_THAT(error, HasSubstr("give --gpu-memory-utilization=0.78"));
  memory.utilization = 0.78;
  EXPECT_OK(PlanDevicePool(Qwen25(), memory, 65536, 131072));
  memory.utilization = 0.77;
  EXPECT_FALSE(PlanDevicePool(Qwen25(), memory, 65536, 131072).ok());
}

TEST(MemoryPlanTest, ACardThatOthersFillIsRefusedWithAllFigures) {
  DeviceMemory memory = Card();
  memory.used_before = 4 * kGiB;
  auto plan = PlanDevicePool(Qwen25(), memory, 0, 131072);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(ErrorOf(plan), AllOf(HasSubstr("other processes use 4.0 GiB of the card's 24.0 GiB"),
                                   HasSubstr("20.0 GiB are free"),
                                   HasSubstr("--gpu-memory-utilization=0.90 wants 21.6 GiB"),
                                   HasSubstr("or give --gpu-memory-utilization=0.83")));
  memory.utilization = 0.83;
  EXPECT_OK(PlanDevicePool(Qwen25(), memory, 0, 131072));
  // What is free would not do in any case.
  memory.used_before = 18 * kGiB;
  memory.utilization = 0.25;
  plan = PlanDevicePool(Qwen25(), memory, 0, 131072);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(ErrorOf(plan), AllOf(HasSubstr("of the card's 24.0 GiB, 18.0 GiB were in use"),
                                   HasSubstr("weights take 14.2 GiB and workspaces 1.0 GiB"),
                                   HasSubstr("--gpu-memory-utilization=0.25 allows 6.0 GiB"),
                                   HasSubstr("end the other processes on the card")));
  // Alone on the card a model that is too large has nobody to blame.
  memory = Card();
  memory.weights = 30 * kGiB;
  EXPECT_THAT(ErrorOf(PlanDevicePool(Qwen25(), memory, 0, 131072)),
              HasSubstr("the model is too large for the card"));
}

// Each process has a share of its own, in whatever order they come.
TEST(MemoryPlanTest, ProcessesShareACard) {
  DeviceMemory memory = Card();
  memory.total = 80 * kGiB;
  memory.utilization = 0.45;
  const auto first = PlanDevicePool(Qwen25(), memory, 0, 131072);
  ASSERT_OK(first);
  memory.used_before += 36 * kGiB;
  const auto second = PlanDevicePool(Qwen25(), memory, 0, 131072);
  ASSERT_OK(second);
  EXPECT_EQ(first->num_blocks, second->num_blocks);
  memory.used_before += 36 * kGiB;
  EXPECT_FALSE(PlanDevicePool(Qwen25(), memory, 0, 131072).ok());
}

// What is planned is a rank's piece; who reads the error gives flags for all of them.
TEST(MemoryPlanTest, TheFlagsThatAreAdvisedSpeakOfAllPieces) {
  DeviceMemory memory = Card();
  memory.ranks = 2;
  memory.pool = 10 * kGiB;
  EXPECT_THAT(ErrorOf(PlanDevicePool(Qwen25(), memory, 0, 131072)),
              HasSubstr("--kv-cache-memory-bytes=21474836480 (20.0 GiB) does not fit"));
  memory.pool = 1 * kGiB;
  const size_t piece = size_t{57344} * 32768;  // of the length asked for
  EXPECT_THAT(ErrorOf(PlanDevicePool(Qwen25(), memory, 32768, 131072)),
              HasSubstr(fmt::format("give --kv-cache-memory-bytes={}", 2 * piece)));
}

// The context and the desktop are no reason to refuse a large share.
TEST(MemoryPlanTest, AQuietCardGivesAllThatIsFree) {
  DeviceMemory memory = Card();
  memory.utilization = 1;
  const auto plan = PlanDevicePool(Qwen25(), memory, 0, 131072);
  ASSERT_OK(plan);
  EXPECT_EQ(plan->num_blocks,
            static_cast<int>((24 * 1024 - 500 - 14500 - 1024) * kMiB / (57344 * 16)));
}

TEST(MemoryPlanTest, APoolOfAGivenSizeOverridesTheUtilization) {
  DeviceMemory memory = Card();
  memory.utilization = 0.1;
  memory.pool = 2 * kGiB;
  const auto plan = PlanDevicePool(Qwen25(), memory, 0, 131072);
  ASSERT_OK(plan);
  EXPECT_EQ(plan->num_blocks, static_cast<int>(2 * kGiB / (57344 * 16)));
  EXPECT_THAT(ErrorOf(PlanDevicePool(Qwen25(), memory, 65536, 131072)),
              HasSubstr("give --kv-cache-memory-bytes=3758096384"));
  memory.pool = 10 * kGiB;
  const auto refused = PlanDevicePool(Qwen25(), memory, 0, 131072);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(ErrorOf(refused),
              AllOf(HasSubstr("--kv-cache-memory-bytes=10737418240 (10.0 GiB) does not fit"),
                    HasSubstr("which leaves 8.4 GiB")));
}

TEST(MemoryPlanTest, APoolOfHostMemory) {
  const auto plan = PlanPool(Qwen25(), 57344 * 16 * 10 + 5, 160, 32768, "give more");
  ASSERT_OK(plan);
  EXPECT_EQ(plan->num_blocks, 10);
  EXPECT_THAT(ErrorOf(PlanPool(Qwen25(), 57344 * 16 * 10, 161, 32768, "give more")),
              HasSubstr("the largest that would fit is 160, or give more"));
  EXPECT_THAT(ErrorOf(PlanPool(Qwen25(), 57344, 0, 32768, "give more")),
              HasSubstr("does not hold a single block of 16 tokens, which takes 917504 bytes"));
}

}  // namespace
}  // namespace tandem::engine
