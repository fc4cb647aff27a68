#include "worker/launched_steps.h"

#include <span>
#include <vector>

#include "gtest/gtest.h"

#include "simulation/fake_clock.h"
#include "simulation/fake_engine.h"

namespace tandem::worker {
namespace {

class LaunchedStepsTest : public testing::Test {
 protected:
  // One prompt of four tokens, as sequence `name`.
  void Launch(uint64_t name, const engine::BlockLease& lease) {
    engine::Batch batch;
    engine::BatchItem& item = batch.items.emplace_back();
    item.tokens = tokens_;
    item.num_tokens = 4;
    item.prompt_length = 4;
    item.block_table = lease.blocks();
    item.sampling = &sampling_;
    ASSERT_TRUE(steps_.Launch(batch, {{name, 0, 4, true}}).ok());
  }

  const std::vector<int32_t> tokens_ = {1, 2, 3, 4};
  const engine::SamplingParams sampling_{};
  FakeClock clock_;
  engine::FakeEngine engine_{{.num_blocks = 4, .block_size = 4, .model = {.max_in_flight = 2}}};
  LaunchedSteps steps_{&engine_.runner(), &engine_.pool, &clock_};
};

TEST_F(LaunchedStepsTest, AreCollectedOldestFirst) {
  const engine::BlockLease a = *engine_.pool.Reserve(1);
  const engine::BlockLease b = *engine_.pool.Reserve(1);
  Launch(7, a);
  EXPECT_FALSE(steps_.full());
  Launch(8, b);
  EXPECT_TRUE(steps_.full());
  const CollectedStep first = steps_.Collect();
  EXPECT_EQ(first.runs[0].sequence, 7u);
  EXPECT_TRUE(first.output.ok());
  EXPECT_EQ(first.NumTokens(), 4);
  EXPECT_EQ(steps_.Collect().runs[0].sequence, 8u);
  EXPECT_TRUE(steps_.empty());
}

TEST_F(LaunchedStepsTest, ADroppedSequenceIsNamedNoMoreAndItsBlocksWaitForTheStep) {
  engine::BlockLease lease = *engine_.pool.Reserve(2);
  Launch(7, lease);
  EXPECT_TRUE(steps_.Contains(7));
  steps_.Drop(7, std::move(lease));
  EXPECT_FALSE(steps_.Contains(7));
  EXPECT_EQ(steps_.num_returning_blocks(), 2);
  EXPECT_EQ(engine_.pool.counts().quarantined, 2);
  EXPECT_EQ(steps_.Collect().runs[0].sequence, 0u);
  EXPECT_EQ(steps_.num_returning_blocks(), 0);
  EXPECT_EQ(engine_.pool.counts().free, 4);
}

TEST_F(LaunchedStepsTest, BlocksWaitForTheNewestStepThatTouchesThem) {
  engine::BlockLease lease = *engine_.pool.Reserve(1);
  Launch(7, lease);
  Launch(7, lease);
  steps_.Drop(7, std::move(lease));
  steps_.Collect();
  EXPECT_EQ(engine_.pool.counts().quarantined, 1);
  steps_.Collect();
  EXPECT_EQ(engine_.pool.counts().quarantined, 0);
}

TEST_F(LaunchedStepsTest, BlocksThatNoStepTouchesAreFreeAtOnce) {
  engine::BlockLease other = *engine_.pool.Reserve(1);
  Launch(7, other);
  steps_.Drop(8, *engine_.pool.Reserve(2));
  EXPECT_EQ(engine_.pool.counts().free, 3);
  EXPECT_EQ(steps_.num_returning_blocks(), 0);
}

TEST_F(LaunchedStepsTest, AStepTakesAsLongAsItHeldTheDevice) {
  const engine::BlockLease lease = *engine_.pool.Reserve(1);
  Launch(7, lease);
  clock_.Advance(absl::Milliseconds(2));
  Launch(8, lease);
  clock_.Advance(absl::Milliseconds(3));
  EXPECT_EQ(steps_.Collect().took, absl::Milliseconds(5));
  clock_.Advance(absl::Milliseconds(4));
  EXPECT_EQ(steps_.Collect().took, absl::Milliseconds(4));  // it began when the first one ended
}

TEST_F(LaunchedStepsTest, TheHostsTimeIsTakenWhereTheDeviceIsBusyMeanwhile) {
  const engine::BlockLease lease = *engine_.pool.Reserve(1);
  Launch(7, lease);
  clock_.Advance(absl::Milliseconds(2));
  Launch(7, lease);
  EXPECT_EQ(steps_.host_time(), absl::ZeroDuration());  // no step was collected
  steps_.Collect();
  clock_.Advance(absl::Milliseconds(3));
  Launch(7, lease);
  EXPECT_EQ(steps_.host_time(), absl::Milliseconds(3));
  steps_.Collect();
  steps_.Collect();
  clock_.Advance(absl::Seconds(5));  // nobody asked for anything
  Launch(7, lease);
  EXPECT_EQ(steps_.host_time(), absl::Milliseconds(3));
}

TEST_F(LaunchedStepsTest, ADraftIsKnownUntilItIsCollected) {
  const engine::BlockLease lease = *engine_.pool.Reserve(1);
  Launch(7, lease);
  EXPECT_FALSE(steps_.drafted());
  engine::Batch batch;
  engine::BatchItem& item = batch.items.emplace_back();
  const std::vector<int32_t> draft = {5};
  item.tokens = std::span(tokens_).first(2);
  item.draft = draft;
  item.num_tokens = 3;
  item.prompt_length = 2;
  item.block_table = lease.blocks();
  item.sampling = &sampling_;
  ASSERT_TRUE(steps_.Launch(batch, {{7, 0, 3, true, 1}}).ok());
  EXPECT_TRUE(steps_.drafted());
  steps_.Collect();
  EXPECT_TRUE(steps_.drafted());
  steps_.Collect();
  EXPECT_FALSE(steps_.drafted());
}

}  // namespace
}  // namespace tandem::worker
