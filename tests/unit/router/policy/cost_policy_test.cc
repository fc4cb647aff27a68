#include "router/policy/cost_policy.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/refusal.h"
#include "router/policy/costs.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"
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

TEST(CostPolicy, APromptGoesOnlyToWorkersThatHoldIt) {
  ClusterView view = TwoByTwo();
  for (const int small : {0, 2}) {
    WorkerIdentity identity = *view.workers[small].identity;
    identity.max_model_len = 1000;
    view.workers[small].identity = std::make_shared<const WorkerIdentity>(std::move(identity));
  }
  const auto longer = Query(view, 1001).Choose(view);
  ASSERT_OK(longer);
  EXPECT_EQ(longer->decode.id, "decode-1");
  EXPECT_THAT(PrefillIds(*longer), ElementsAre("prefill-1"));
  // All of what it holds is room for a prompt of a prefill worker's; a decode worker adds a token.
  const auto full = Query(view, 1000).Choose(view);
  ASSERT_OK(full);
  EXPECT_EQ(full->decode.id, "decode-1");
  EXPECT_THAT(PrefillIds(*full), ElementsAre("prefill-0", "prefill-1"));
  EXPECT_EQ(Query(view, 999).Choose(view)->decode.id, "decode-0");
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

// A worker that takes blocks.
void SetKvAddress(WorkerView* worker) {
  WorkerIdentity identity = *worker->identity;
  identity.kv_address = identity.id + ":9";
  worker->identity = std::make_shared<const WorkerIdentity>(std::move(identity));
}

// TwoByTwo, where prefill workers take blocks back.
ClusterView TakingBack() {
  ClusterView view = TwoByTwo();
  for (const int p : {2, 3}) SetKvAddress(&view.workers[static_cast<size_t>(p)]);
  return view;
}

TEST(CostPolicy, TheLastAnswerComesBackWhereThatIsFasterThanToComputeIt) {
  ClusterView view = TakingBack();
  Query query(view, 2000);
  query.cached[2] = 512;   // the first turn's prompt
  query.cached[1] = 1504;  // and its answer
  // 992 tokens: 124 ms to compute, 58 ms to bring over a link of 1 GB/s.
  auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-1");
  EXPECT_EQ(route->prefill.front().id, "prefill-0");
  EXPECT_EQ(route->prefill.front().return_address, "prefill-0:9");
  EXPECT_EQ(route->uncached_tokens, 496);
  EXPECT_EQ(route->predicted_cached_tokens, 1504);
  EXPECT_THAT(route->reason, testing::HasSubstr("512 of 2000 tokens cached there, 992 come back"));

  // Over a link of 200 MB/s they are computed.
  LoadReport slow;
  slow.links["prefill-0"].bytes_per_second = slow.links["prefill-1"].bytes_per_second = 2e8;
  view.workers[1] = MakeWorker("decode-1", WorkerRole::kDecode, slow);
  LoadReport fast = PrefillLoad(10000);
  fast.links["decode-0"].bytes_per_second = fast.links["decode-1"].bytes_per_second = 1e9;
  for (const int p : {2, 3}) view.workers[static_cast<size_t>(p)].Take(fast);
  route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-0");
  EXPECT_EQ(route->prefill.front().return_address, "");
  EXPECT_EQ(route->uncached_tokens, 1488);
}

TEST(CostPolicy, NothingComesBackOverALinkThatIsRefused) {
  ClusterView view = TakingBack();
  Query query(view, 2000);
  query.cached[1] = 1504;
  LoadReport refused;
  refused.links["prefill-0"].refused = refused.links["prefill-1"].refused = true;
  view.workers[1] = MakeWorker("decode-1", WorkerRole::kDecode, refused);
  const auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().return_address, "");
}

// Where all of a conversation can come back, the worker that has its beginning is not waited for.
TEST(CostPolicy, AQueueWhereThePrefixIsCostsMoreThanToBringItElsewhere) {
  ClusterView view = TakingBack();
  Query query(view, 2000);
  query.cached[2] = 1504;
  query.cached[1] = 1504;
  query.routed[2].prefill_tokens = 2000;  // 200 ms
  const auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-1");
  EXPECT_EQ(route->prefill.front().return_address, "prefill-1:9");
  EXPECT_EQ(route->uncached_tokens, 496);
}

TEST(CostPolicy, SlowLinkIsAvoided) {
  ClusterView view = TwoByTwo();
  LoadReport slow = PrefillLoad(10000);
  slow.links = {{"decode-0", {1e7}}, {"decode-1", {1e7}}};
  LoadReport mixed = PrefillLoad(10000);
  mixed.links = {{"decode-0", {1e7}}, {"decode-1", {1e10}}};
  view.workers[2] = MakeWorker("prefill-0", WorkerRole::kPrefill, slow);
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, mixed);
  const auto route = Query(view, 1000).Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->decode.id, "decode-1");
  EXPECT_EQ(route->prefill.front().id, "prefill-1");
}

TEST(CostPolicy, ARefusedLinkIsTheLastResort) {
  ClusterView view = TwoByTwo();
  LoadReport refused = PrefillLoad(10000);
  refused.links = {{"decode-0", {.bytes_per_second = 1e10}}, {"decode-1", {.refused = true}}};
  LoadReport slow = PrefillLoad(10000, 50000);  // five seconds of work wait there
  slow.links = {{"decode-0", {1e6}}, {"decode-1", {1e6}}};
  view.workers[2] = MakeWorker("prefill-0", WorkerRole::kPrefill, refused);
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, slow);
  EXPECT_EQ(Query(view, 1000).Choose(view)->decode.id, "decode-0");

  Query query(view, 1000);
  query.excluded[0] = Exclusion::kLost;
  auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_THAT(PrefillIds(*route), ElementsAre("prefill-1", "prefill-0"));

  query.excluded[3] = Exclusion::kLost;
  route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_THAT(PrefillIds(*route), ElementsAre("prefill-0"));
}

// A worker that has just come, whose links nobody knows, is not left out beside one with fast ones.
TEST(CostPolicy, ALinkThatWasNeverUsedIsTried) {
  ClusterView view = TwoByTwo();
  LoadReport known = PrefillLoad(10000);
  known.links = {{"decode-0", {1e12}}, {"decode-1", {1e12}}};
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, known);
  Query query(view, 4000);
  query.routed[3].prefill_tokens = 5;  // a little busier
  const auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-0");
}

LoadReport Fitted(double tokens_per_second, double tokens, int64_t waiting_tokens = 0) {
  LoadReport load = PrefillLoad(tokens_per_second, waiting_tokens);
  load.prefill_fit_tokens = tokens;
  return load;
}

// An idle L4 beside an H100 with a third of a second of work: waiting is the faster way.
TEST(CostPolicy, AMixedFleetIsPricedAsItIs) {
  ClusterView view = TwoByTwo();
  view.workers[2] = MakeWorker("prefill-0", WorkerRole::kPrefill, Fitted(5000, 50000));
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, Fitted(60000, 80000, 20000));
  auto route = Query(view, 4000).Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-1");
  // A second of it: now the L4, which takes 0.8 s, is the faster way.
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, Fitted(60000, 80000, 60000));
  route = Query(view, 4000).Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-0");
}

TEST(CostPolicy, ARateOfFewTokensIsMostlyTheMean) {
  ClusterView view = TwoByTwo();
  view.workers[2] = MakeWorker("prefill-0", WorkerRole::kPrefill, Fitted(500, 20));
  view.workers[3] = MakeWorker("prefill-1", WorkerRole::kPrefill, Fitted(10000, 50000, 2000));
  const auto route = Query(view, 1000).Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.front().id, "prefill-0");
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

// What is promised to prompts that wait for a prefill worker is no room for another of them.
TEST(CostPolicy, PromisedRoomIsForWhatIsComputedThere) {
  LoadReport load;
  load.waiting = load.promised_sequences = 16;
  load.admits_blocks = 900;
  load.promised_blocks = 880;
  load.prefill_backlog["prefill-0"] = 14'000;
  const ClusterView view =
      MakeView({MakeWorker("decode-0", WorkerRole::kDecode, load),
                MakeWorker("prefill-0", WorkerRole::kPrefill, PrefillLoad(10000, 2000))});
  const absl::Status asks = Query(view, 1000).Choose(view).status();
  EXPECT_EQ(asks.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(RefusalOf(asks).has_value());
  const auto local = Query(view, 30).Choose(view);
  ASSERT_OK(local);
  EXPECT_TRUE(local->prefill.empty());
}

// A prompt that a decode worker will ask for queues as one that was asked for does.
TEST(CostPolicy, WhatDecodeWorkersHoldBackCountsIntoTheQueue) {
  LoadReport load;
  load.prefill_backlog["prefill-0"] = 10'000;
  load.waiting = load.promised_sequences = 5;
  const ClusterView view =
      MakeView({MakeWorker("decode-0", WorkerRole::kDecode, load),
                MakeWorker("prefill-0", WorkerRole::kPrefill, PrefillLoad(10000, 2000)),
                MakeWorker("prefill-1", WorkerRole::kPrefill, PrefillLoad(10000, 8000))});
  Query query(view, 1000);
  const auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(PrefillIds(*route)[0], "prefill-1");
  // A long prompt waits for all of it, a short one only for as many as short as it is.
  EXPECT_NEAR(Query(view, 9000).Choose(view)->wait_ms, 800, 1);
  EXPECT_NEAR(route->wait_ms, 5 * 1000 * 4 / 3 / 10, 1);
}

// Requests are refused by the wait, so neither a prior nor what other prompts took makes one.
TEST(CostPolicy, NothingWaitsLongWhereTheQueueWasNotSeenToMove) {
  LoadReport load;
  load.waiting_tokens = 2000;
  load.waiting = 20;
  for (const double of_single_prompts : {0.0, 4000.0}) {
    load.prefill_tokens_per_second = of_single_prompts;
    load.prefill_fit_tokens = 600;
    load.saturated_tokens_per_second = 0;
    const auto wait_ms = [&] {
      const ClusterView view = MakeView({MakeWorker("decode-0", WorkerRole::kDecode),
                                         MakeWorker("prefill-0", WorkerRole::kPrefill, load)});
      return Query(view, 100).Choose(view)->wait_ms;
    };
    EXPECT_EQ(wait_ms(), 0);
    load.saturated_tokens_per_second = 100'000;
    EXPECT_NEAR(wait_ms(), 20, 1);
  }
}

TEST(CostPolicy, ASuspectPrefillWorkerIsForWhenThereIsNoOther) {
  const ClusterView view = TwoByTwo();
  Query query(view, 1000);
  query.excluded[2] = Exclusion::kSuspect;
  auto route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_THAT(PrefillIds(*route), ElementsAre("prefill-1"));
  query.excluded[3] = Exclusion::kSuspect;
  route = query.Choose(view);
  ASSERT_OK(route);
  EXPECT_EQ(route->prefill.size(), 2u);
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

// ---- against the price of every pair ----

// Prices every pair and takes the best: what Choose does, without its short lists.
Candidate PlainBest(const ClusterView& view, const RouteQuery& query) {
  const CostPolicyOptions options;
  const Costs costs(options, view, query);
  std::optional<Candidate> best;
  const auto offer = [&](int d, int p, double ms) {
    const Candidate candidate(query, d, p, ms);
    if (!best || candidate.key < best->key) best = candidate;
  };
  const int n = static_cast<int>(view.workers.size());
  for (int d = 0; d < n; ++d) {
    if (view.workers[d].prefills() || !costs.Usable(d) || !costs.HasRoom(d, true)) continue;
    if (costs.MayPrefillLocally(d)) offer(d, -1, costs.LocalMs(d));
    if (view.workers[d].identity->role == WorkerRole::kUnified) continue;
    for (int p = 0; p < n; ++p) {
      if (view.workers[p].prefills() && costs.Usable(p)) offer(d, p, costs.RemoteMs(p, d));
    }
  }
  return best.value_or(Candidate(query, 0, -1, -1));
}

struct RandomCluster {
  ClusterView view;
  std::unique_ptr<Query> query;
};

// Loads are coarse, so that many workers tie.
RandomCluster MakeRandomCluster(std::mt19937& random, int workers, bool links, bool idle) {
  const auto draw = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<WorkerView> views;
  for (int w = 0; w < workers; ++w) {
    const bool prefill = w % 2 == 0;
    LoadReport load;
    load.prefill_tokens_per_second = draw(4) == 0 ? 0 : 5000 + 1000 * draw(5);
    load.decode_step_milliseconds = draw(4) == 0 ? 0 : 10 + draw(3);
    if (!idle) {
      load.waiting_tokens = 500 * draw(4);
      load.running = draw(12);
      load.blocks_used = 50 * draw(10);
    }
    for (int to = prefill ? 1 : 0; links && to < workers; to += 2) {
      if (draw(3) > 0) load.links[fmt::format("w{:04}", to)].bytes_per_second = 5e8 * (1 + draw(8));
    }
    const WorkerRole role = prefill       ? WorkerRole::kPrefill
                            : draw(8) > 0 ? WorkerRole::kDecode
                                          : WorkerRole::kUnified;
    views.push_back(MakeWorker(fmt::format("w{:04}", w), role, load));
    views.back().draining = draw(20) == 0;
    if (prefill && draw(2) == 0) SetKvAddress(&views.back());
  }
  RandomCluster out;
  out.view = MakeView(std::move(views));
  out.query = std::make_unique<Query>(out.view, 20 + draw(3000));
  for (int w = 0; w < workers; ++w) {
    if (draw(3) == 0) out.query->cached[w] = draw(out.query->prompt_tokens / 16 + 1) * 16;
    out.query->routed[w].total = static_cast<uint64_t>(draw(5));
    if (draw(3) == 0) out.query->routed[w].prefill_tokens = 100 * draw(10);
    if (draw(20) == 0) out.query->excluded[w] = Exclusion::kLost;
  }
  return out;
}

TEST(CostPolicyProperty, IsTheBestOfAllPairs) {
  std::mt19937 random(5);
  for (int trial = 0; trial < 3000; ++trial) {
    const RandomCluster cluster =
        MakeRandomCluster(random, 2 + trial % 31, trial % 2 == 0, trial % 3 == 0);
    const Query& q = *cluster.query;
    const Candidate plain =
        PlainBest(cluster.view, {q.prompt_tokens, q.cached, q.routed, q.excluded});
    const auto route = q.Choose(cluster.view);
    ASSERT_EQ(route.ok(), plain.cost_ms >= 0) << trial;
    if (!route.ok()) continue;
    ASSERT_EQ(route->decode.id, cluster.view.workers[plain.decode].identity->id) << trial;
    ASSERT_EQ(route->prefill.empty(), plain.prefill < 0) << trial;
    if (plain.prefill >= 0) {
      ASSERT_EQ(route->prefill.front().id, cluster.view.workers[plain.prefill].identity->id)
          << trial;
    }
    ASSERT_EQ(route->cost_ms, plain.cost_ms) << trial;
  }
}

// Where the short lists are shorter than the cluster: the cost is that of the best pair, to the
// quantum, as long as links do not differ, and close to it where they do.
TEST(CostPolicyProperty, CostsNoMoreThanTheBestOfManyPairs) {
  std::mt19937 random(6);
  double worst = 0;
  int same = 0;
  const int trials = SanitizerShare(200);
  for (int trial = 0; trial < trials; ++trial) {
    const bool links = trial % 2 == 0;
    const RandomCluster cluster = MakeRandomCluster(random, 200, links, trial % 4 < 2);
    const Query& q = *cluster.query;
    const Candidate plain =
        PlainBest(cluster.view, {q.prompt_tokens, q.cached, q.routed, q.excluded});
    const auto route = q.Choose(cluster.view);
    ASSERT_OK(route);
    const bool same_cost = InQuanta(route->cost_ms) == InQuanta(plain.cost_ms);
    ASSERT_TRUE(links || same_cost) << trial;
    worst = std::max(worst, route->cost_ms / plain.cost_ms - 1);
    same += same_cost ? 1 : 0;
  }
  std::printf(
      "of %d choices among 200 workers %d cost what the best pair costs; the worst %.2f %% "
      "more\n",
      trials, same, worst * 100);
  EXPECT_LT(worst, 0.02);
}

}  // namespace
}  // namespace tandem::router
