#include "router/policy/cost_policy.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/unit/router/view_builder.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

struct Query {
  explicit Query(const ClusterView& view, int prompt_tokens)
      : cached(view.workers.size()),
        routed(view.workers.size()),
        excluded(view.workers.size(), Exclusion::kNone),
        prompt_tokens(prompt_tokens) {}

  absl::StatusOr<Route> Choose(const ClusterView& view) const {
    return CostPolicy().Choose(view, {prompt_tokens, cached, routed, excluded});
  }

  std::vector<int> cached;
  std::vector<RoutedWork> routed;
  std::vector<Exclusion> excluded;
  int prompt_tokens;
};

std::vector<std::string> PrefillIds(const Route& route) {
  std::vector<std::string> ids;
  for (const Route::Worker& worker : route.prefill) ids.push_back(worker.id);
  return ids;
}

// 0, 1: decode; 2, 3: prefill.
ClusterView TwoByTwo() {
  return MakeView({MakeWorker("decode-0", WorkerRole::kDecode),
                   MakeWorker("decode-1", WorkerRole::kDecode),
                   MakeWorker("prefill-0", WorkerRole::kPrefill, PrefillLoad(10000)),
                   MakeWorker("prefill-1", WorkerRole::kPrefill, PrefillLoad(10000))});
}

TEST(CostPolicy, TiesGoToTheFirstIdAndThenToTheLessUsed) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  const auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-0");
  EXPECT_THAT(PrefillIds(*route),
              ElementsAre("prefill-0", "prefill-1"));  // the best, then its stand-in
  EXPECT_EQ(route->uncached_tokens, 1000);

  query.routed[0].total = 1;
  query.routed[2].total = 1;
  const auto next = query.Choose(view);
  ASSERT_OK(next);
  EXPECT_EQ(next->decode.id, "decode-1");
  EXPECT_THAT(PrefillIds(*next), ElementsAre("prefill-1", "prefill-0"));
}

TEST(CostPolicy, FollowsTheCacheWhileTheQueueIsShort) {
  ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.cached[3] = 800;  // saves 80 ms of prefill
  auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-1");
  EXPECT_EQ(route->predicted_cached_tokens, 800);
  EXPECT_EQ(route->uncached_tokens, 200);

  // 2,000 tokens waiting there cost 200 ms: more than the cache saves.
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, PrefillLoad(10000, 2000));
  route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-0");
}

TEST(CostPolicy, CountsWhatWasRoutedSinceTheReport) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.routed[2].prefill_tokens = 5000;
  query.routed[0].sequences = 8;
  const auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-1");
  EXPECT_EQ(route->prefill.front().id, "prefill-1");
}

TEST(CostPolicy, ShortRestIsPrefilledWhereItIsDecoded) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.cached[1] = 976;  // 24 left, at most 32 are computed locally
  auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-1");
  EXPECT_THAT(route->prefill, IsEmpty());

  query.cached[1] = 960;  // 40 left
  route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.size(), 2u);
}

TEST(CostPolicy, SlowLinkIsAvoided) {
  ClusterView view = TwoByTwo();
  LoadReport slow = PrefillLoad(10000);
  slow.link_bytes_per_second = {{"decode-0", 1e7}, {"decode-1", 1e7}};
  LoadReport mixed = PrefillLoad(10000);
  mixed.link_bytes_per_second = {{"decode-0", 1e7}, {"decode-1", 1e10}};
  view.workers[2] = MakeWorker("prefill-0", WorkerRole::kPrefill, slow);
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, mixed);
  const auto route = Query(view, 1000).Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-1");
  EXPECT_EQ(route->prefill.front().id, "prefill-1");
}

TEST(CostPolicy, UnifiedPrefillsItselfAtAnyLength) {
  const ClusterView view = MakeView({MakeWorker("prefill-0", WorkerRole::kPrefill),
                                     MakeWorker("unified-0", WorkerRole::kUnified)});
  const auto route = Query(view, 4000).Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "unified-0");
  EXPECT_THAT(route->prefill, IsEmpty());
}

TEST(CostPolicy, FiltersDrainingLostAndFullWorkers) {
  ClusterView view = TwoByTwo();
  view.workers[2].draining = true;
  Query query(view, 1000);
  query.excluded[0] = Exclusion::kLost;
  auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-1");
  EXPECT_THAT(PrefillIds(*route), ElementsAre("prefill-1"));

  query.excluded[1] = Exclusion::kFull;
  EXPECT_EQ(query.Choose(view).status().code(), absl::StatusCode::kResourceExhausted);
  query.excluded[1] = Exclusion::kLost;
  EXPECT_EQ(query.Choose(view).status().code(), absl::StatusCode::kUnavailable);
}

TEST(CostPolicy, NoPrefillWorkerIsUnavailableUnlessTheRestIsShort) {
  const ClusterView view = MakeView({MakeWorker("decode-0", WorkerRole::kDecode)});
  EXPECT_EQ(Query(view, 1000).Choose(view).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_OK(Query(view, 30).Choose(view));
}

TEST(CostPolicy, RoomIsCountedInSequencesAndInBlocks) {
  LoadReport busy;
  busy.running = 15;
  busy.admits_blocks = 70;
  const ClusterView view =
      MakeView({MakeWorker("decode-0", WorkerRole::kDecode, busy),
                MakeWorker("prefill-0", WorkerRole::kPrefill, PrefillLoad(10000))});
  Query fits(view, 1000);  // 63 blocks of 70
  EXPECT_OK(fits.Choose(view));
  fits.routed[0].blocks = 10;
  EXPECT_EQ(fits.Choose(view).status().code(), absl::StatusCode::kResourceExhausted);
  fits.cached[0] = 48;  // three blocks less to find room for
  EXPECT_OK(fits.Choose(view));
  Query sequences(view, 100);
  sequences.routed[0].sequences = 1;  // the sixteenth
  EXPECT_EQ(sequences.Choose(view).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(CostPolicy, AnIdleWorkersWordCountsToo) {
  LoadReport idle;
  idle.blocks_free = 10;
  idle.blocks_quarantined = 990;
  idle.admits_blocks = 10;
  const ClusterView view = MakeView({MakeWorker("u", WorkerRole::kUnified, idle)});
  EXPECT_EQ(Query(view, 1000).Choose(view).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_OK(Query(view, 150).Choose(view));
}

TEST(CostPolicy, EqualCostsGoWhereLessMustBeShipped) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.cached[1] = 16;
  query.routed[1].total = 5;
  const auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-1");
}

}  // namespace
}  // namespace tandem::router
