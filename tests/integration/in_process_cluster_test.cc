// A whole cluster in one process, whose model is a hash of everything it was given: a lost, stale
// or mixed-up block changes the tokens. Every answer is compared with what the request gives alone.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "common/base/status.h"
#include "router/api/request_wire.h"
#include "simulation/cluster.h"
#include "simulation/fake_model_runner.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

constexpr int32_t kEos = 3;
constexpr int kMaxInFlight = 48;

InProcessClusterOptions Options() {
  InProcessClusterOptions options;
  options.worker.engine.num_blocks = 160;  // small enough that blocks are evicted and reused
  options.worker.engine.model.vocab_size = 200;
  options.worker.max_model_len = 512;
  return options;
}

struct Plan {
  v1::GenerateRequest message;
  engine::SamplingParams sampling;
  std::vector<int32_t> prompt;
  int turns_per_message = 1;  // of the client
  int cancel_after = 0;       // turns; 0: never
};

// Conversations that share beginnings: a third of the requests goes on where an earlier one was.
class Workload {
 public:
  Workload(const InProcessClusterOptions& options, uint32_t seed)
      : vocab_(options.worker.engine.model.vocab_size), random_(seed) {
    for (int i = 0; i < 24; ++i) prefixes_.push_back(Tokens(Uniform(16, 300)));
  }

  Plan Next() {
    Plan plan;
    plan.prompt = prefixes_[static_cast<size_t>(Uniform(0, 23))];
    const std::vector<int32_t> tail = Tokens(Uniform(1, 90));
    plan.prompt.insert(plan.prompt.end(), tail.begin(), tail.end());
    if (Uniform(0, 2) == 0) prefixes_[static_cast<size_t>(Uniform(0, 23))] = Shortened(plan.prompt);
    plan.sampling.temperature = Uniform(0, 1) == 0 ? 0.0f : 1.0f;
    plan.sampling.seed = static_cast<uint64_t>(Uniform(0, 1 << 20));
    plan.sampling.max_tokens = Uniform(1, 40);
    plan.sampling.eos_token_ids = {kEos};
    plan.sampling.ignore_eos = Uniform(0, 3) == 0;
    if (Uniform(0, 9) == 0) plan.turns_per_message = 5;
    if (Uniform(0, 19) == 0) plan.cancel_after = Uniform(1, 30);

    for (int32_t id : plan.prompt) {
      plan.message.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
    }
    v1::SamplingParams& sampling = *plan.message.mutable_sampling();
    sampling.set_temperature(plan.sampling.temperature);
    sampling.set_seed(plan.sampling.seed);
    sampling.set_max_tokens(static_cast<uint32_t>(plan.sampling.max_tokens));
    sampling.set_ignore_eos(plan.sampling.ignore_eos);
    return plan;
  }

 private:
  int Uniform(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  std::vector<int32_t> Tokens(int count) {
    std::vector<int32_t> out;
    for (int i = 0; i < count; ++i) out.push_back(Uniform(4, vocab_ - 1));
    return out;
  }
  static std::vector<int32_t> Shortened(std::vector<int32_t> tokens) {
    tokens.resize(std::min<size_t>(tokens.size(), 320));
    return tokens;
  }

  const int vocab_;
  std::mt19937 random_;
  std::vector<std::vector<int32_t>> prefixes_;
};

// Runs requests against a cluster, a bounded number at a time, and checks every answer.
class Clients {
 public:
  Clients(InProcessCluster* cluster, const InProcessClusterOptions& options)
      : cluster_(cluster), options_(options), model_(InProcessCluster::MakeModel(options.worker)) {
    model_.eos_token_ids = {kEos};
  }

  void Requests(int count, uint32_t seed) {
    Workload workload(options_, seed);
    int64_t turns = 0;
    for (int submitted = 0; submitted < count || !running_.empty();) {
      while (submitted < count && running_.size() < kMaxInFlight) {
        Submit(workload.Next());
        ++submitted;
      }
      if (++turn_ == kill_decode_after) cluster_->KillDecode(0);
      cluster_->Turn();
      Pump();
      ASSERT_LT(++turns, 2'000'000) << running_.size() << " requests never end";
    }
  }

  // What cancelled transfers and late replies still hold is given back.
  void Unwind() {
    for (int i = 0; i < 20'000 && !cluster_->Held().empty(); ++i) cluster_->Turn();
  }

  int kill_decode_after = 0;  // turns; 0: never
  int finished = 0;
  int cancelled = 0;
  int64_t cached_tokens = 0;
  std::set<std::string> prefill_workers, decode_workers;
  StageTimes most;  // of all requests
  int most_attempts = 0;

 private:
  struct Running {
    Plan plan;
    std::unique_ptr<InProcessClient> client;
    int turns = 0;
  };

  void Submit(Plan plan) {
    const absl::Time now = cluster_->clock().Now();
    router::RequestLimits limits;
    limits.max_model_len = options_.worker.max_model_len;
    auto request = router::GenerateRequestFromProto(model_, limits, plan.message, now,
                                                    now + absl::Hours(1), &cluster_->clock());
    ASSERT_OK(request);
    const int turns_per_message = plan.turns_per_message;
    running_.push_back(
        {std::move(plan), std::make_unique<InProcessClient>(&cluster_->core(), *std::move(request),
                                                            turns_per_message)});
  }

  void Pump() {
    for (Running& running : running_) {
      if (running.plan.cancel_after > 0 && ++running.turns == running.plan.cancel_after) {
        running.client->Cancel();
      }
      running.client->Pump();
      if (running.client->finished()) Check(running);
    }
    std::erase_if(running_, [](const Running& r) { return r.client->finished(); });
  }

  void Check(const Running& running) {
    const std::vector<int32_t> want = engine::FakeReferenceTokens(
        running.plan.prompt, running.plan.sampling, options_.worker.max_model_len,
        options_.worker.engine.model.vocab_size);
    const std::vector<int32_t> got = running.client->tokens();
    if (absl::IsCancelled(running.client->outcome())) {
      ++cancelled;
      EXPECT_GT(running.plan.cancel_after, 0);
      ASSERT_LE(got.size(), want.size());
      EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin()));
      return;
    }
    ++finished;
    EXPECT_OK(running.client->outcome());
    EXPECT_EQ(got, want);
    const router::GenerateResponse last = running.client->last();
    EXPECT_EQ(last.prompt_tokens, static_cast<int>(running.plan.prompt.size()));
    EXPECT_EQ(last.completion_tokens, static_cast<int>(want.size()));
    ASSERT_TRUE(last.timing.has_value());
    CheckTimes(*last.timing);
    cached_tokens += last.cached_tokens;
    decode_workers.insert(last.timing->decode_worker);
    prefill_workers.insert(last.timing->prefill_worker);
  }

  void CheckTimes(const Timing& timing) {
    double sum = 0;
    for (const StageInfo& info : kStages) {
      EXPECT_GE(timing.stages[info.stage], 0) << info.name;
      if (info.in_ttft) sum += timing.stages[info.stage];
      most[info.stage] = std::max(most[info.stage], timing.stages[info.stage]);
    }
    const double ttft = timing.stages[Stage::kTtft];
    EXPECT_NEAR(sum, ttft, 1 + ttft / 100);
    most_attempts = std::max(most_attempts, timing.prefill_attempts);
  }

  InProcessCluster* const cluster_;
  const InProcessClusterOptions options_;
  router::ServedModel model_;
  int turn_ = 0;
  std::vector<Running> running_;
};

// Greedy, and without an end but its length.
router::Request PlainRequest(InProcessCluster* cluster, const std::vector<int32_t>& prompt,
                             int max_tokens) {
  v1::GenerateRequest message;
  for (const int32_t id : prompt) message.mutable_token_ids()->add_ids(static_cast<uint32_t>(id));
  message.mutable_sampling()->set_temperature(0);
  message.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(max_tokens));
  message.mutable_sampling()->set_ignore_eos(true);
  router::RequestLimits limits;
  limits.max_model_len = cluster->core().max_model_len();
  const absl::Time now = cluster->clock().Now();
  auto request = router::GenerateRequestFromProto(cluster->core().model(), limits, message, now,
                                                  now + absl::Minutes(10), &cluster->clock());
  EXPECT_OK(request);
  return *std::move(request);
}

// Turns follow at once, before workers have reported that they are idle again.
TEST(InProcessClusterTest, AConversationStaysWhereItsBlocksAreAndShipsOnlyNewOnes) {
  InProcessClusterOptions options = Options();
  options.worker.local_prefill_max_tokens = 0;
  InProcessCluster cluster(options);
  std::vector<int32_t> conversation(150, 7);
  uint64_t bytes_of_block = 0;
  std::string home;
  int blocks_held = 0;
  for (int turn = 1; turn <= 6; ++turn) {
    InProcessClient client(&cluster.core(), PlainRequest(&cluster, conversation, 10), 1);
    for (int i = 0; i < 10'000 && !client.finished(); ++i) {
      cluster.Turn();
      client.Pump();
    }
    ASSERT_TRUE(client.finished());
    ASSERT_OK(client.outcome());
    const Timing timing = client.last().timing.value();
    const int blocks = static_cast<int>(conversation.size() + 15) / 16;
    if (turn == 1) {
      bytes_of_block = timing.kv_bytes / static_cast<uint64_t>(blocks);
      home = timing.decode_worker;
    }
    std::printf("turn %d: %zu tokens, %.0f ms, %s, %d blocks shipped\n", turn, conversation.size(),
                timing.stages[Stage::kTtft], timing.decode_worker.c_str(),
                static_cast<int>(timing.kv_bytes / bytes_of_block));
    EXPECT_EQ(timing.decode_worker, home);
    // A block that was full there, with prompt or answer, is not shipped again.
    if (turn > 1) {
      EXPECT_LE(timing.kv_bytes, bytes_of_block * static_cast<uint64_t>(blocks - blocks_held));
    }
    const std::vector<int32_t> answer = client.tokens();
    conversation.insert(conversation.end(), answer.begin(), answer.end());
    blocks_held = static_cast<int>(conversation.size() - 1) / 16;
    for (int i = 0; i < 20; ++i) conversation.push_back(8 + turn);
  }
}

TEST(InProcessClusterTest, AThousandRequestsGiveTheTokensThatEachGivesAlone) {
  const InProcessClusterOptions options = Options();
  InProcessCluster cluster(options);
  Clients clients(&cluster, options);
  clients.Requests(1000, 1);
  EXPECT_EQ(clients.finished + clients.cancelled, 1000);
  EXPECT_GT(clients.cancelled, 10);
  EXPECT_GT(clients.cached_tokens, 0);
  EXPECT_EQ(clients.decode_workers, (std::set<std::string>{"decode-0", "decode-1"}));
  EXPECT_TRUE(clients.prefill_workers.contains("prefill-0"));
  EXPECT_TRUE(clients.prefill_workers.contains("prefill-1"));
  clients.Unwind();
  EXPECT_EQ(cluster.Held(), "");
}

TEST(InProcessClusterTest, ADeviceThatRunsAStepAheadGivesTheSameTokens) {
  InProcessClusterOptions options = Options();
  options.worker.engine.model.max_in_flight = 2;
  options.worker.engine.step_delay = [] { return absl::Microseconds(50); };
  InProcessCluster cluster(options);
  Clients clients(&cluster, options);
  clients.Requests(300, 2);
  EXPECT_EQ(clients.finished + clients.cancelled, 300);
  clients.Unwind();
  EXPECT_EQ(cluster.Held(), "");
}

TEST(InProcessClusterTest, UnifiedWorkersGiveTheSameTokens) {
  InProcessClusterOptions options = Options();
  options.prefill_workers = 0;
  options.unified = true;
  InProcessCluster cluster(options);
  Clients clients(&cluster, options);
  clients.Requests(300, 3);
  EXPECT_EQ(clients.finished + clients.cancelled, 300);
  clients.Unwind();
  EXPECT_EQ(cluster.Held(), "");
}

TEST(InProcessClusterTest, EveryMillisecondHasAStage) {
  InProcessClusterOptions options = Options();
  options.worker.engine.num_blocks = 64;  // so few that answers that grow preempt each other
  // So seldom that no request meets it twice: INTERNAL is final then.
  int prefills = 0;
  options.before_prefill = [&prefills](const engine::Batch&) {
    return ++prefills % 23 == 0 ? absl::InternalError("out of luck") : absl::OkStatus();
  };
  InProcessCluster cluster(options);
  Clients clients(&cluster, options);
  clients.Requests(500, 5);  // each is checked: its stages make up its time to first token
  EXPECT_GT(clients.most_attempts, 1);
  EXPECT_GT(clients.most[Stage::kFailedAttempts], 1);
  EXPECT_GT(clients.most[Stage::kPreempted], 1);
  // A message waits for the next turn wherever it goes: what has no name of its own is that.
  constexpr double kTurns = 8;
  EXPECT_LE(clients.most[Stage::kDelivery], kTurns);
  EXPECT_LE(clients.most[Stage::kPrefillCall], kTurns);
  clients.Unwind();
  EXPECT_EQ(cluster.Held(), "");
}

TEST(InProcessClusterTest, WorkersOnThreadsOfTheirOwnGiveTheSameTokens) {
  InProcessClusterOptions options = Options();
  options.turn = absl::Microseconds(20);  // a turn does not wait for the workers
  InProcessCluster cluster(options);
  cluster.Start();
  Clients clients(&cluster, options);
  clients.Requests(300, 4);
  cluster.Stop();
  EXPECT_EQ(clients.finished + clients.cancelled, 300);
  clients.Unwind();
  EXPECT_EQ(cluster.Held(), "");
}

// kill -9 of a decode worker under streams: the other one goes on behind the last token.
TEST(InProcessClusterTest, AWorkerThatDiesUnderStreamsLosesNoTokenAndRepeatsNone) {
  InProcessClusterOptions options = Options();
  options.decode_workers = 3;
  options.worker.engine.num_blocks = 400;
  InProcessCluster cluster(options);
  Clients clients(&cluster, options);
  clients.kill_decode_after = 60;
  clients.Requests(200, 5);
  const double migrations = cluster.core().metrics().migrations.Value();
  std::printf("%.0f streams went on elsewhere\n", migrations);
  EXPECT_GT(migrations, 3);
  EXPECT_EQ(clients.finished + clients.cancelled, 200);
  clients.Unwind();
  EXPECT_EQ(cluster.Held(), "");
}

// A kernel that never ends: the process lives, so its calls and its stay do. What runs there goes
// on elsewhere after 10 s without progress, and nothing new is sent there after 3 s.
TEST(InProcessClusterTest, NothingWaitsForALoopThatHangs) {
  for (const bool prefill : {false, true}) {
    InProcessClusterOptions options = Options();
    options.worker.engine.num_blocks = 400;
    InProcessCluster cluster(options);
    std::vector<std::unique_ptr<InProcessClient>> clients;
    std::vector<int> turns;
    std::mt19937 random(1);
    const auto submit = [&] {
      std::vector<int32_t> prompt;
      for (int i = 0; i < 60; ++i) prompt.push_back(4 + static_cast<int>(random() % 190));
      clients.push_back(std::make_unique<InProcessClient>(&cluster.core(),
                                                          PlainRequest(&cluster, prompt, 30), 1));
      turns.push_back(0);
    };
    const auto run = [&](int count) {
      for (int turn = 0; turn < count; ++turn) {
        cluster.Turn();
        for (size_t i = 0; i < clients.size(); ++i) {
          clients[i]->Pump();
          if (!clients[i]->finished()) ++turns[i];
        }
      }
    };
    for (int i = 0; i < 8; ++i) submit();
    run(5);
    if (prefill) {
      cluster.HangPrefill(0);
    } else {
      cluster.HangDecode(0);
    }
    run(3500);
    const size_t late = clients.size();
    for (int i = 0; i < 8; ++i) submit();
    run(8000);
    int longest = 0, longest_late = 0, unfinished = 0;
    for (size_t i = 0; i < clients.size(); ++i) {
      unfinished += clients[i]->finished() ? 0 : 1;
      if (clients[i]->finished()) {
        EXPECT_OK(clients[i]->outcome());
      }
      (i < late ? longest : longest_late) = std::max(i < late ? longest : longest_late, turns[i]);
    }
    std::printf(
        "a %s worker hangs: %d of 16 never end; the longest takes %d ms, of those that "
        "came 3.5 s later %d ms\n",
        prefill ? "prefill" : "decode", unfinished, longest, longest_late);
    EXPECT_EQ(unfinished, 0);
    EXPECT_LT(longest, 11'500);
    EXPECT_LT(longest_late, 500);
  }
}

// Blocks that nobody can have are worth no try: the refusal says what it lacked, and the router
// waits for a report that shows it.
TEST(InProcessClusterTest, OneThatWaitsForRoomIsNotTriedOverAndOver) {
  InProcessClusterOptions options = Options();
  options.decode_workers = 1;
  InProcessCluster cluster(options);
  engine::BlockPool& pool = cluster.decodes()[0]->engine().pool;
  auto held = pool.Reserve(options.worker.engine.num_blocks - 10);  // as quarantine would
  ASSERT_OK(held);
  const std::vector<int32_t> prompt(400, 7);
  InProcessClient client = {&cluster.core(), PlainRequest(&cluster, prompt, 5), 1};
  prometheus::Counter& refused =
      cluster.core().metrics().retries(router::RouterMetrics::RetryReason::kWorkerFull);
  const auto run = [&](int turns) {
    for (int i = 0; i < turns && !client.finished(); ++i) {
      cluster.Turn();
      client.Pump();
    }
  };
  run(5000);
  std::printf("%.0f refusals in 5 s\n", refused.Value());
  EXPECT_LT(refused.Value(), 5 * 5);
  EXPECT_FALSE(client.finished());
  held->Release();
  run(1200);
  EXPECT_TRUE(client.finished());
  EXPECT_OK(client.outcome());
  EXPECT_EQ(client.tokens().size(), 5u);
}

}  // namespace
}  // namespace tandem
