// A whole cluster in a loop over a request trace: does the policy keep prefill work spread while it
// finds cached prefixes?
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <functional>
#include <list>
#include <random>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "router/dispatch/routed_ledger.h"
#include "router/policy/cost_policy.h"
#include "router/prefix_index/prefix_index.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"
#include "tests/unit/router/view_builder.h"

namespace tandem::router {
namespace {

constexpr int kBlock = 512;  // tokens; the trace names prefixes at this grain

struct TraceRequest {
  double at_ms = 0;
  int prompt_tokens = 0;
  std::vector<Hash128> blocks;  // full blocks only
};

// A prefill worker: an LRU of blocks and the time at which its queue is empty.
class SimulatedPrefill {
 public:
  SimulatedPrefill(PrefixIndex* index, size_t capacity)
      : index_(index), capacity_(capacity), slot_(index->AddWorker(capacity)) {}

  PrefixIndex::Slot slot() const { return slot_; }
  double busy_until() const { return busy_until_; }
  int64_t computed_tokens() const { return computed_; }

  // Returns the tokens served from the cache.
  int Run(const TraceRequest& request, double rate) {
    size_t hit = 0;
    while (hit < request.blocks.size() && Has(request.blocks[hit])) ++hit;
    const int cached = std::min(static_cast<int>(hit) * kBlock, request.prompt_tokens - 1);
    const int computed = request.prompt_tokens - cached;
    computed_ += computed;
    busy_until_ = std::max(busy_until_, request.at_ms) + computed / rate * 1e3;
    for (const Hash128& hash : request.blocks) Store(hash);
    return cached;
  }

 private:
  bool Has(const Hash128& hash) const { return places_.count(hash) > 0; }
  void Store(const Hash128& hash) {
    if (const auto it = places_.find(hash); it != places_.end()) {
      lru_.splice(lru_.begin(), lru_, it->second);
      return;
    }
    std::vector<Hash128> removed;
    if (lru_.size() >= capacity_) {
      removed.push_back(lru_.back());
      places_.erase(lru_.back());
      lru_.pop_back();
    }
    lru_.push_front(hash);
    places_[hash] = lru_.begin();
    index_->Apply(slot_, false, {}, removed);
    index_->Apply(slot_, false, std::span(&hash, 1), {});
  }

  PrefixIndex* const index_;
  const size_t capacity_;
  const PrefixIndex::Slot slot_;
  std::list<Hash128> lru_;
  absl::flat_hash_map<Hash128, std::list<Hash128>::iterator> places_;
  double busy_until_ = 0;
  int64_t computed_ = 0;
};

struct Outcome {
  double busiest_share = 0;  // of all requests
  double busiest_work = 0;   // of all computed tokens
  double hit_ratio = 0;      // of all prompt tokens
};

// Picks a prefill worker: its number.
using Chooser = std::function<int(const ClusterView&, const RouteQuery&)>;

Outcome Simulate(const std::vector<TraceRequest>& trace, int workers, size_t capacity,
                 const Chooser& choose) {
  constexpr double kRate = 20000;         // tokens/s
  constexpr double kReportEveryMs = 500;  // so that choices are made on stale loads
  PrefixIndex index;
  RoutedLedger ledger(absl::ZeroDuration());
  std::vector<SimulatedPrefill> prefill;
  for (int i = 0; i < workers; ++i) prefill.emplace_back(&index, capacity);
  std::vector<int> requests(static_cast<size_t>(workers));
  ClusterView view;
  double reported_ms = -1e9;
  int64_t tokens = 0, hits = 0;
  uint64_t number = 0;
  for (const TraceRequest& request : trace) {
    const absl::Time now = absl::UnixEpoch() + absl::Milliseconds(request.at_ms);
    if (request.at_ms - reported_ms >= kReportEveryMs) {
      reported_ms = request.at_ms;
      std::vector<WorkerView> views = {MakeWorker("unbounded-decode", WorkerRole::kDecode)};
      for (int i = 0; i < workers; ++i) {
        const double queue_ms = std::max(0.0, prefill[i].busy_until() - request.at_ms);
        views.push_back(
            MakeWorker("prefill-" + std::to_string(i), WorkerRole::kPrefill,
                       PrefillLoad(kRate, static_cast<int64_t>(queue_ms * kRate / 1e3))));
        views.back().reported = now;
      }
      view = MakeView(std::move(views));
      view.block_size = kBlock;
    }
    std::vector<int> cached(view.workers.size());
    std::vector<RoutedWork> routed(view.workers.size());
    const std::vector<Exclusion> excluded(view.workers.size(), Exclusion::kNone);
    for (const PrefixIndex::Match& match : index.Lookup(request.blocks)) {
      cached[match.worker + 1] = match.blocks * kBlock;
    }
    for (size_t w = 1; w < view.workers.size(); ++w) {
      routed[w] = ledger.Since(view.workers[w].identity->id, view.workers[w].reported);
    }
    const int p = choose(view, {request.prompt_tokens, cached, routed, excluded});
    RoutedWork work;
    work.prefill_tokens = request.prompt_tokens - cached[static_cast<size_t>(p) + 1];
    ledger.Add("prefill-" + std::to_string(p), ++number, now, work);
    ++requests[static_cast<size_t>(p)];
    tokens += request.prompt_tokens;
    hits += prefill[static_cast<size_t>(p)].Run(request, kRate);
  }
  Outcome out;
  int64_t computed = 0, most = 0;
  for (const SimulatedPrefill& worker : prefill) {
    computed += worker.computed_tokens();
    most = std::max(most, worker.computed_tokens());
  }
  out.busiest_share = static_cast<double>(*std::max_element(requests.begin(), requests.end())) /
                      static_cast<double>(trace.size());
  out.busiest_work = static_cast<double>(most) / static_cast<double>(computed);
  out.hit_ratio = static_cast<double>(hits) / static_cast<double>(tokens);
  return out;
}

Chooser CostChooser() {
  CostPolicyOptions options;
  options.prior_link_bytes_per_second = 10e9;
  return [policy = CostPolicy(options)](const ClusterView& view, const RouteQuery& query) {
    const auto route = policy.Choose(view, query);
    EXPECT_OK(route);
    if (!route.ok() || route->prefill.empty()) return 0;
    return std::stoi(route->prefill.front().id.substr(std::string("prefill-").size()));
  };
}

Chooser RandomChooser(int workers) {
  return [workers, random = std::mt19937(1)](const ClusterView&, const RouteQuery&) mutable {
    return static_cast<int>(random() % static_cast<unsigned>(workers));
  };
}

Chooser LongestPrefixChooser() {
  return [](const ClusterView&, const RouteQuery& query) {
    const auto first = query.cached_tokens.begin() + 1;
    return static_cast<int>(std::max_element(first, query.cached_tokens.end()) - first);
  };
}

// Conversations that share one system prompt; each turn extends the last one.
std::vector<TraceRequest> SyntheticTrace(int requests) {
  std::mt19937 random(3);
  std::vector<TraceRequest> conversations(200);
  uint64_t next = 1;
  for (size_t c = 0; c < conversations.size(); ++c) conversations[c].blocks = {{0, 0}};
  std::vector<TraceRequest> trace;
  for (int i = 0; i < requests; ++i) {
    TraceRequest& conversation = conversations[random() % conversations.size()];
    if (conversation.blocks.size() > 30) conversation.blocks.resize(1);  // a new one
    for (unsigned b = 0; b < 2 + random() % 6; ++b) conversation.blocks.push_back({1, next++});
    conversation.prompt_tokens =
        static_cast<int>(conversation.blocks.size()) * kBlock + static_cast<int>(random() % 500);
    conversation.at_ms = i * 100.0;
    trace.push_back(conversation);
  }
  return trace;
}

std::vector<TraceRequest> ReadTrace(const std::string& path, int requests) {
  std::vector<TraceRequest> trace;
  std::ifstream in(path);
  for (std::string line; std::getline(in, line) && std::ssize(trace) < requests;) {
    const auto json = nlohmann::json::parse(line);
    TraceRequest request;
    request.at_ms = json["timestamp"].get<double>();
    request.prompt_tokens = json["input_length"].get<int>();
    for (const auto& id : json["hash_ids"]) request.blocks.push_back({0, id.get<uint64_t>()});
    request.blocks.resize(static_cast<size_t>(request.prompt_tokens / kBlock));
    trace.push_back(std::move(request));
  }
  return trace;
}

void ExpectSpreadAndHits(const std::vector<TraceRequest>& trace, int workers, size_t capacity) {
  const Outcome cost = Simulate(trace, workers, capacity, CostChooser());
  const Outcome random = Simulate(trace, workers, capacity, RandomChooser(workers));
  const Outcome longest = Simulate(trace, workers, capacity, LongestPrefixChooser());
  std::printf(
      "requests %zu, workers %d: cost policy: busiest %.3f of requests, %.3f of work, hits "
      "%.3f; random: %.3f, %.3f, %.3f; longest prefix: %.3f, %.3f, %.3f\n",
      trace.size(), workers, cost.busiest_share, cost.busiest_work, cost.hit_ratio,
      random.busiest_share, random.busiest_work, random.hit_ratio, longest.busiest_share,
      longest.busiest_work, longest.hit_ratio);
  const double fair = 1.0 / workers;
  EXPECT_LT(cost.busiest_share, 1.5 * fair);
  EXPECT_LT(cost.busiest_work, 1.3 * fair);
  EXPECT_GT(cost.hit_ratio, 1.3 * random.hit_ratio);
  // What this guards against: the shared first block draws everything to one worker.
  EXPECT_GT(longest.busiest_share, 0.9);
}

TEST(RoutingSimulation, SyntheticConversations) {
  ExpectSpreadAndHits(SyntheticTrace(4000), 4, 4000);
}

TEST(RoutingSimulation, MooncakeConversationTrace) {
  TANDEM_REQUIRE_SHARED();
  if (SanitizerSlowsBy() > 1) GTEST_SKIP() << "FirstRequestsOfTheTrace runs the same code";
  const auto trace = ReadTrace(SharedDir() + "/traces/conversation_trace.jsonl", 6000);
  ASSERT_EQ(trace.size(), 6000u);
  ExpectSpreadAndHits(trace, 4, 20000);
}

// Four caches, each of the blocks that an RTX 4090D has room for, and one pool of all four: what
// their capacity allows.
struct Replay {
  Outcome cost, pooled;
};

Replay ReplayOn(const std::vector<TraceRequest>& trace, size_t capacity) {
  Replay out;
  out.cost = Simulate(trace, 4, capacity, CostChooser());
  out.pooled =
      Simulate(trace, 1, 4 * capacity, [](const ClusterView&, const RouteQuery&) { return 0; });
  std::printf(
      "%zu requests, 4 x %zu blocks: hits %.4f of all tokens, in one pool %.4f; busiest "
      "worker %.3f of the mean by work, %.3f by requests\n",
      trace.size(), capacity, out.cost.hit_ratio, out.pooled.hit_ratio, 4 * out.cost.busiest_work,
      4 * out.cost.busiest_share);
  return out;
}

TEST(RoutingSimulation, WholeTraceOnFourSmallCaches) {
  TANDEM_REQUIRE_SHARED();
  if (SanitizerSlowsBy() > 1) GTEST_SKIP() << "FirstRequestsOfTheTrace runs the same code";
  const auto trace = ReadTrace(SharedDir() + "/traces/conversation_trace.jsonl", 1 << 20);
  ASSERT_EQ(trace.size(), 12031u);
  const Replay replay = ReplayOn(trace, 4359);
  EXPECT_GE(replay.cost.hit_ratio, 0.95 * 0.234);
  EXPECT_LE(4 * replay.cost.busiest_work, 1.10);
  EXPECT_LE(4 * replay.cost.busiest_share, 1.10);
}

// The first requests of the same trace, which are in the tree.
TEST(RoutingSimulation, FirstRequestsOfTheTrace) {
  const auto trace = ReadTrace(SourcePath("tests/data/conversation_trace.jsonl"), 1 << 20);
  ASSERT_EQ(trace.size(), 60u);
  const Replay replay = ReplayOn(trace, 100);
  EXPECT_GE(replay.cost.hit_ratio, 0.5 * replay.pooled.hit_ratio);
  EXPECT_LE(4 * replay.cost.busiest_work, 1.3);
}

}  // namespace
}  // namespace tandem::router
