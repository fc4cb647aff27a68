// What the router's decisions cost as the cluster grows: no network, no workers, the real registry,
// prefix index, policy and dispatcher.
//
//   router_bench [MAX_WORKERS=1000] [MAX_BLOCKS=1000000]
//
// Times are of the calling thread alone (CLOCK_THREAD_CPUTIME_ID), so that other load on the
// machine disturbs them little. Each table ends with a ratio to its first row: what grows by no
// more than its size is near-linear.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <malloc.h>
#include <memory>
#include <random>
#include <string>
#include <time.h>
#include <vector>

#include "fmt/format.h"
#include "spdlog/spdlog.h"

#include "bench/usage.h"
#include "common/base/check.h"
#include "common/base/clock.h"
#include "common/base/locks.h"
#include "common/rpc/cluster_client.h"
#include "router/dispatch/dispatcher.h"
#include "router/policy/cost_policy.h"
#include "router/prefix_index/prefix_index.h"
#include "router/registry/registry.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem::router {
namespace {

constexpr int kBlockTokens = 16;
constexpr int kSharedBlocks = 256;  // 4,096 tokens that every worker holds
constexpr int kChainBlocks = 128;   // of what one worker holds by itself, in one chain

int64_t ThreadNanoseconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

double HeapBytes() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<double>(info.uordblks) + static_cast<double>(info.hblkhd);
}

struct Percentiles {
  double p50 = 0, p99 = 0;  // microseconds
};

Percentiles Of(std::vector<int64_t> nanoseconds) {
  std::sort(nanoseconds.begin(), nanoseconds.end());
  const auto at = [&](double p) {
    return static_cast<double>(
               nanoseconds[static_cast<size_t>(p * static_cast<double>(nanoseconds.size() - 1))]) /
           1e3;
  };
  return {at(0.5), at(0.99)};
}

std::vector<int32_t> Tokens(uint64_t name, int blocks) {
  std::mt19937 random(static_cast<uint32_t>(name * 2654435761u + 1));
  std::vector<int32_t> out(static_cast<size_t>(blocks * kBlockTokens));
  for (int32_t& token : out) token = static_cast<int32_t>(random() % 100'000);
  return out;
}

std::vector<Hash128> Chain(uint64_t name, int blocks) {
  return HashTokenBlocks(BlockHashSeed("", "digest", ""), Tokens(name, blocks), kBlockTokens);
}

// ---- the index alone ----

struct IndexCost {
  double store_ns = 0, remove_ns = 0;  // per block
  double bytes = 0;                    // per block
  Percentiles lookup;                  // of the shared chain
  double leave_ms = 0;                 // a worker's
};

IndexCost MeasureIndex(int workers, int blocks) {
  const int own = std::max(1, (blocks - kSharedBlocks) / workers);
  const std::vector<Hash128> shared = Chain(0, kSharedBlocks);
  std::mt19937_64 random(1);
  std::vector<std::vector<Hash128>> of_worker(static_cast<size_t>(workers));
  for (std::vector<Hash128>& hashes : of_worker) {
    for (int i = 0; i < own; ++i) hashes.push_back({random(), random()});
  }
  IndexCost out;
  const double heap = HeapBytes();
  auto index = std::make_unique<PrefixIndex>();
  std::vector<PrefixIndex::Slot> slots;
  for (int w = 0; w < workers; ++w) {
    slots.push_back(index->AddWorker(static_cast<size_t>(2 * (own + kSharedBlocks))));
  }
  int64_t start = ThreadNanoseconds();
  for (size_t w = 0; w < slots.size(); ++w) {
    index->Apply(slots[w], false, shared, {});
    index->Apply(slots[w], false, of_worker[w], {});
  }
  const double operations = static_cast<double>(workers) * (own + kSharedBlocks);
  out.store_ns = static_cast<double>(ThreadNanoseconds() - start) / operations;
  out.bytes = (HeapBytes() - heap) / static_cast<double>(index->size());

  std::vector<int64_t> lookups;
  for (int i = 0; i < 2000; ++i) {
    start = ThreadNanoseconds();
    const size_t matches = index->Lookup(shared).size();
    lookups.push_back(ThreadNanoseconds() - start);
    TANDEM_CHECK(matches == slots.size(), "{} of {} workers found", matches, slots.size());
  }
  out.lookup = Of(std::move(lookups));

  start = ThreadNanoseconds();
  index->RemoveWorker(slots.back());
  out.leave_ms = static_cast<double>(ThreadNanoseconds() - start) / 1e6;
  slots.pop_back();

  start = ThreadNanoseconds();
  for (size_t w = 0; w < slots.size(); ++w) index->Apply(slots[w], false, {}, of_worker[w]);
  out.remove_ns =
      static_cast<double>(ThreadNanoseconds() - start) / (static_cast<double>(slots.size()) * own);
  return out;
}

// ---- whole decisions ----

class NoRequest : public Dispatchable {
 public:
  explicit NoRequest(std::vector<int32_t> tokens) : tokens_(std::move(tokens)) {}
  RoutablePrompt prompt() const override { return {"bench", tokens_, "", 0}; }
  void Start(const Route& route) override { uncached = route.uncached_tokens; }
  void Fail(const absl::Status& status) override { TANDEM_CHECK(false, "{}", status.ToString()); }

  int uncached = -1;

 private:
  const std::vector<int32_t> tokens_;
};

internal::v1::Capability MakeCapability() {
  internal::v1::Capability out;
  out.set_model("bench");
  out.set_model_digest("digest");
  out.set_block_size(kBlockTokens);
  out.set_num_layers(28);
  out.set_num_kv_heads(4);
  out.set_head_dim(128);
  return out;
}

struct Cluster {
  PrefixIndex index;
  Registry registry{{.model = "bench"}, &index, Clock::Real()};
  std::vector<Registry::Member> members;
  std::vector<uint64_t> chains;  // names of those that some prefill worker holds
};

LoadReport RandomLoad(std::mt19937& random, int workers, bool prefill, bool links) {
  LoadReport load;
  load.prefill_tokens_per_second = 9000 + static_cast<double>(random() % 2000);
  load.waiting_tokens = prefill ? static_cast<int64_t>(random() % 20000) : 0;
  load.decode_step_milliseconds = 10 + static_cast<double>(random() % 5);
  load.running = static_cast<int>(random() % 60);
  load.blocks_free = load.admits_blocks = 100'000;
  for (int d = 1; prefill && links && d < workers; d += 2) {
    load.links[fmt::format("worker-{:04}", d)].bytes_per_second =
        1.8e10 + static_cast<double>(random() % 1000) * 4e6;
  }
  return load;
}

// Every second worker prefills. All hold the shared blocks, and the rest is spread over them.
std::unique_ptr<Cluster> MakeCluster(int workers, int blocks, bool links) {
  auto cluster = std::make_unique<Cluster>();
  std::mt19937 random(2);
  const std::vector<Hash128> shared = Chain(0, kSharedBlocks);
  for (int w = 0; w < workers; ++w) {
    WorkerIdentity identity;
    identity.id = fmt::format("worker-{:04}", w);
    identity.role = w % 2 == 0 ? WorkerRole::kPrefill : WorkerRole::kDecode;
    identity.address = "127.0.0.1:1";
    identity.max_num_seqs = 256;
    identity.num_blocks = blocks;
    const auto member = cluster->registry.Join(identity, MakeCapability(), [] {});
    TANDEM_CHECK(member.ok(), "{}", member.status().ToString());
    cluster->members.push_back(*member);
    cluster->registry.Report(*member, RandomLoad(random, workers, w % 2 == 0, links));
    cluster->index.Apply(*member, false, shared, {});
    for (int b = kSharedBlocks / workers; b < (blocks - kSharedBlocks) / workers;
         b += kChainBlocks) {
      cluster->chains.push_back(cluster->chains.size() + 1);
      cluster->index.Apply(*member, false, Chain(cluster->chains.back(), kChainBlocks), {});
    }
  }
  return cluster;
}

// One request at a time, a third of which nobody has seen, a third in the shared prefix and a third
// in somebody's own. Before each some worker has reported its load, as in a large cluster, so each
// makes a view of its own.
std::vector<int64_t> TimeDecisions(int workers, int blocks, bool links) {
  const auto cluster = MakeCluster(workers, blocks, links);
  const CostPolicy policy;
  Metrics metrics;
  RouterMetrics router_metrics(&metrics);
  Dispatcher dispatcher({}, &cluster->registry, &cluster->index, &policy, &router_metrics,
                        Clock::Real());
  std::mt19937 random(3);
  std::vector<int64_t> decisions;
  for (int i = 0; i < 3000; ++i) {
    const size_t w = random() % cluster->members.size();
    cluster->registry.Report(cluster->members[w], RandomLoad(random, workers, w % 2 == 0, links));
    uint64_t name = uint64_t{1} << 40 | random();
    if (i % 3 == 0) name = 0;
    if (i % 3 == 1 && !cluster->chains.empty()) {
      name = cluster->chains[random() % cluster->chains.size()];
    }
    const auto request =
        std::make_shared<NoRequest>(Tokens(name, name == 0 ? kSharedBlocks : kChainBlocks));
    Dispatcher::Ticket ticket;
    TANDEM_CHECK(dispatcher.Submit(request, &ticket).ok(), "refused");
    const int64_t start = ThreadNanoseconds();
    dispatcher.Step(absl::ZeroDuration());
    decisions.push_back(ThreadNanoseconds() - start);
    TANDEM_CHECK(request->uncached >= 0, "not routed");
    if (i >= 500) dispatcher.Ended(ticket - 500);  // so many are running
  }
  decisions.erase(decisions.begin(), decisions.begin() + 500);
  return decisions;
}

struct DecisionCost {
  Percentiles one_pass;
  // Of each decision the least of three passes: what else runs on the machine empties the caches
  // again and again, and would decide the percentiles.
  Percentiles least;
};

DecisionCost MeasureDecisions(int workers, int blocks, bool links) {
  std::vector<int64_t> least = TimeDecisions(workers, blocks, links);
  DecisionCost out;
  out.one_pass = Of(least);
  for (int pass = 0; pass < 2; ++pass) {
    const std::vector<int64_t> again = TimeDecisions(workers, blocks, links);
    for (size_t i = 0; i < least.size(); ++i) least[i] = std::min(least[i], again[i]);
  }
  out.least = Of(std::move(least));
  return out;
}

void Run(int max_workers, int max_blocks) {
  fmt::print("index: {} blocks shared by all workers, the rest each of one\n", kSharedBlocks);
  fmt::print("{:>8} {:>9} {:>10} {:>11} {:>9} {:>16} {:>9} {:>9}\n", "workers", "blocks",
             "store M/s", "remove M/s", "B/block", "lookup p50 (us)", "p99 (us)", "leave (ms)");
  for (int workers = 10; workers <= max_workers; workers *= 10) {
    for (int blocks = 10'000; blocks <= max_blocks; blocks *= 10) {
      const IndexCost cost = MeasureIndex(workers, blocks);
      fmt::print("{:>8} {:>9} {:>10.1f} {:>11.1f} {:>9.1f} {:>16.1f} {:>9.1f} {:>9.2f}\n", workers,
                 blocks, 1e3 / cost.store_ns, 1e3 / cost.remove_ns, cost.bytes, cost.lookup.p50,
                 cost.lookup.p99, cost.leave_ms);
    }
  }
  fmt::print("\ndecisions: hash the prompt, find its blocks, price, choose (half prefill)\n");
  fmt::print("{:>8} {:>9} {:>6} {:>9} {:>9} {:>9} {:>16} {:>9}\n", "workers", "blocks", "links",
             "p50 (us)", "p99 (us)", "x of 10", "least of 3: p50", "p99 (us)");
  for (const bool links : {false, true}) {
    for (int blocks = 10'000; blocks <= max_blocks; blocks *= 10) {
      double first = 0;
      for (int workers = 10; workers <= max_workers; workers *= 10) {
        const DecisionCost cost = MeasureDecisions(workers, blocks, links);
        if (first == 0) first = cost.one_pass.p50;
        fmt::print("{:>8} {:>9} {:>6} {:>9.1f} {:>9.1f} {:>9.1f} {:>16.1f} {:>9.1f}\n", workers,
                   blocks, links ? "all" : "none", cost.one_pass.p50, cost.one_pass.p99,
                   cost.one_pass.p50 / first, cost.least.p50, cost.least.p99);
      }
    }
  }
}

}  // namespace
}  // namespace tandem::router

int main(int argc, char** argv) {
  tandem::WatchNoLockOrders();  // as the programs do
  if (tandem::AnswerHelp(argc, argv, "router_bench [MAX_WORKERS >= 10] [MAX_BLOCKS >= 10000]")) {
    return 0;
  }
  const int max_workers = argc > 1 ? std::atoi(argv[1]) : 1000;
  const int max_blocks = argc > 2 ? std::atoi(argv[2]) : 1'000'000;
  if (max_workers < 10 || max_blocks < 10'000) {
    fmt::print(stderr, "usage: router_bench [MAX_WORKERS >= 10] [MAX_BLOCKS >= 10000]\n");
    return 2;
  }
  spdlog::set_level(spdlog::level::warn);
  tandem::router::Run(max_workers, max_blocks);
  return 0;
}
