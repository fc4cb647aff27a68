#include "worker/reporter.h"

#include <vector>

#include "gtest/gtest.h"

#include "simulation/fake_clock.h"
#include "simulation/fake_engine.h"

namespace tandem::worker {
namespace {

class ReporterTest : public testing::Test {
 protected:
  void Report() {
    reporter_.Report([this] {
      LoadReport load;
      load.running = running_;
      return load;
    });
  }

  int running_ = 0;
  FakeClock clock_;
  engine::FakeEngine engine_{{.num_blocks = 4, .block_size = 4}};
  WorkerMetrics metrics_{&engine_.metrics};
  std::vector<LoadReport> loads_;
  std::vector<std::pair<engine::BlockEvents, bool>> blocks_;
  Reporter reporter_{{.interval = absl::Seconds(1), .min_interval = absl::Milliseconds(50)},
                     {.load = [this](const LoadReport& load) { loads_.push_back(load); },
                      .blocks = [this](const engine::BlockEvents& events,
                                       bool cleared) { blocks_.emplace_back(events, cleared); }},
                     &engine_.pool,
                     &engine_.cache,
                     &metrics_,
                     &clock_};
};

TEST_F(ReporterTest, ReportsEveryIntervalAndSoonerAfterAChange) {
  running_ = 3;
  Report();
  ASSERT_EQ(loads_.size(), 1u);
  EXPECT_EQ(loads_[0].running, 3);
  EXPECT_EQ(loads_[0].blocks_free, 4);
  EXPECT_EQ(metrics_.requests_running.Value(), 3);
  Report();
  EXPECT_EQ(loads_.size(), 1u);
  EXPECT_EQ(reporter_.IdleWait(), absl::Seconds(1));

  reporter_.NoteChange();
  EXPECT_EQ(reporter_.IdleWait(), absl::Milliseconds(50));
  Report();
  EXPECT_EQ(loads_.size(), 1u);  // not so soon
  clock_.Advance(absl::Milliseconds(50));
  Report();
  EXPECT_EQ(loads_.size(), 2u);

  clock_.Advance(absl::Milliseconds(999));
  Report();
  EXPECT_EQ(loads_.size(), 2u);
  clock_.Advance(absl::Milliseconds(1));
  Report();
  EXPECT_EQ(loads_.size(), 3u);
}

TEST_F(ReporterTest, ChangesOfThePrefixCacheGoOutAtOnce) {
  Report();
  EXPECT_TRUE(blocks_.empty());
  const std::vector<int32_t> tokens = {1, 2, 3, 4};
  {
    const engine::BlockLease lease = *engine_.pool.Reserve(1);
    engine_.cache.Insert(Hash128{}, tokens, lease, 0);
  }
  Report();
  ASSERT_EQ(blocks_.size(), 1u);
  EXPECT_EQ(blocks_[0].first.stored.size(), 1u);
  EXPECT_FALSE(blocks_[0].second);
  reporter_.ReportSnapshot();
  ASSERT_EQ(blocks_.size(), 2u);
  EXPECT_EQ(blocks_[1].first.stored.size(), 1u);
  EXPECT_TRUE(blocks_[1].second);
}

TEST_F(ReporterTest, CountersOfTheCacheAreExportedOnce) {
  const std::vector<int32_t> tokens = {1, 2, 3, 4, 5};
  for (int i = 1; i <= 3; ++i) {
    engine_.cache.Match(Hash128{}, tokens, 1);
    clock_.Advance(absl::Seconds(1));
    Report();
    EXPECT_EQ(metrics_.prefix_query_tokens.Value(), 5 * i);
  }
}

}  // namespace
}  // namespace tandem::worker
