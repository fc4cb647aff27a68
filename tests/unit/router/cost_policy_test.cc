#include "router/policy/cost_policy.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "router/policy/routed_ledger.h"
#include "tests/support/paths.h"
#include "tests/unit/router/view_builder.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

struct Query {
  explicit Query(const ClusterView& view, int prompt_tokens)
      : cached(view.workers.size()),
        assigned(view.workers.size()),
        excluded(view.workers.size(), Exclusion::kNone),
        prompt_tokens(prompt_tokens) {}

  absl::StatusOr<RouteChoice> Choose(const ClusterView& view) const {
    return CostPolicy().Choose(view, {prompt_tokens, cached, assigned, excluded});
  }

  std::vector<int> cached;
  std::vector<AssignedWork> assigned;
  std::vector<Exclusion> excluded;
  int prompt_tokens;
};

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
  const auto choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->decode, 0);
  EXPECT_THAT(choice->prefill, ElementsAre(2, 3));  // the best, then its stand-in
  EXPECT_EQ(choice->uncached_tokens, 1000);

  query.assigned[0].total = 1;
  query.assigned[2].total = 1;
  const auto next = query.Choose(view);
  ASSERT_OK(next);
  EXPECT_EQ(next->decode, 1);
  EXPECT_THAT(next->prefill, ElementsAre(3, 2));
}

TEST(CostPolicy, FollowsTheCacheWhileTheQueueIsShort) {
  ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.cached[3] = 800;  // saves 80 ms of prefill
  auto choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->prefill.front(), 3);
  EXPECT_EQ(choice->predicted_cached_tokens, 800);
  EXPECT_EQ(choice->uncached_tokens, 200);

  // 2,000 tokens waiting there cost 200 ms: more than the cache saves.
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, PrefillLoad(10000, 2000));
  choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->prefill.front(), 2);
}

TEST(CostPolicy, CountsWhatWasRoutedSinceTheReport) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.assigned[2].prefill_tokens = 5000;
  query.assigned[0].sequences = 8;
  const auto choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->decode, 1);
  EXPECT_EQ(choice->prefill.front(), 3);
}

TEST(CostPolicy, ShortRestIsPrefilledWhereItIsDecoded) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.cached[1] = 976;  // 24 left, at most 32 are computed locally
  auto choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->decode, 1);
  EXPECT_THAT(choice->prefill, IsEmpty());

  query.cached[1] = 960;  // 40 left
  choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->prefill.size(), 2u);
}

TEST(CostPolicy, SlowLinkIsAvoided) {
  ClusterView view = TwoByTwo();
  WorkerLoad slow = PrefillLoad(10000);
  slow.link_bytes_per_second = {{"decode-0", 1e7}, {"decode-1", 1e7}};
  WorkerLoad mixed = PrefillLoad(10000);
  mixed.link_bytes_per_second = {{"decode-0", 1e7}, {"decode-1", 1e10}};
  view.workers[2] = MakeWorker("prefill-0", WorkerRole::kPrefill, slow);
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, mixed);
  const auto choice = Query(view, 1000).Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->decode, 1);
  EXPECT_EQ(choice->prefill.front(), 3);
}

TEST(CostPolicy, UnifiedPrefillsItselfAtAnyLength) {
  const ClusterView view = MakeView({MakeWorker("prefill-0", WorkerRole::kPrefill),
                                     MakeWorker("unified-0", WorkerRole::kUnified)});
  const auto choice = Query(view, 4000).Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->decode, 1);
  EXPECT_THAT(choice->prefill, IsEmpty());
}

TEST(CostPolicy, FiltersDrainingLostAndFullWorkers) {
  ClusterView view = TwoByTwo();
  view.workers[2].draining = true;
  Query query(view, 1000);
  query.excluded[0] = Exclusion::kLost;
  auto choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->decode, 1);
  EXPECT_THAT(choice->prefill, ElementsAre(3));

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
  WorkerLoad busy;
  busy.running = 15;
  busy.blocks_free = 10;
  busy.blocks_cached = 60;
  busy.blocks_used = 930;
  const ClusterView view =
      MakeView({MakeWorker("decode-0", WorkerRole::kDecode, busy),
                MakeWorker("prefill-0", WorkerRole::kPrefill, PrefillLoad(10000))});
  Query fits(view, 1000);  // 63 blocks of 70
  EXPECT_OK(fits.Choose(view));
  fits.assigned[0].blocks = 10;
  EXPECT_EQ(fits.Choose(view).status().code(), absl::StatusCode::kResourceExhausted);
  Query sequences(view, 100);
  sequences.assigned[0].sequences = 1;  // the sixteenth
  EXPECT_EQ(sequences.Choose(view).status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(CostPolicy, EqualCostsGoWhereLessMustBeShipped) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.cached[1] = 16;
  query.assigned[1].total = 5;
  const auto choice = query.Choose(view);
  ASSERT_OK(choice);
  EXPECT_EQ(choice->decode, 1);
}

TEST(RoutedLedger, IsTheDifferenceToTheLastReport) {
  const absl::Time start = absl::UnixEpoch();
  const auto at = [&](int ms) { return start + absl::Milliseconds(ms); };
  RoutedLedger ledger(absl::Milliseconds(50));
  AssignedWork work;
  work.sequences = 1;
  work.prefill_tokens = 100;
  ledger.Add("a", 1, at(0), work);
  ledger.Add("a", 2, at(100), work);
  ledger.Add("b", 2, at(100), work);
  EXPECT_EQ(ledger.Since("a", absl::InfinitePast()).prefill_tokens, 200);
  // A report at 120 ms contains the first, and may not contain the second.
  EXPECT_EQ(ledger.Since("a", at(120)).sequences, 1);
  EXPECT_EQ(ledger.Since("a", at(120)).prefill_tokens, 100);
  // The second was refused: it never ran.
  ledger.Remove(2);
  EXPECT_EQ(ledger.Since("a", at(120)).sequences, 0);
  EXPECT_EQ(ledger.Since("b", start).sequences, 0);
  // The first ends: the report still counts it, the next one will not.
  ledger.End(1, at(130));
  EXPECT_EQ(ledger.Since("a", at(120)).sequences, -1);
  EXPECT_EQ(ledger.Since("a", at(200)).sequences, 0);
  // Begun and ended between two reports: no difference.
  ledger.Add("a", 3, at(210), work);
  ledger.End(3, at(220));
  EXPECT_EQ(ledger.Since("a", at(200)).sequences, 0);
  EXPECT_EQ(ledger.Since("a", at(200)).prefill_tokens, 0);
  EXPECT_EQ(ledger.Since("a", start).total, 3u);
  EXPECT_EQ(ledger.Since("unknown", start).total, 0u);
}

}  // namespace
}  // namespace tandem::router
