// The same 200 seeded requests through 2 prefill + 2 decode over shm, where the decode workers
// speculate (on a CPU), 1 + 1 over tcp, and unified:
// the tokens must be identical, and so must every bit of their logprobs, which would show a wrong
// KV block long before it changed a token. TANDEM_EQUALITY_REQUESTS asks for fewer, as builds with
// a sanitizer do, or more; TANDEM_EQUALITY_TRANSPORT for one transport (of --kv-transport) in both.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <random>
#include <set>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

constexpr int kAllRequests = 200;
constexpr int kFewestRequests = 50;  // fewer might reuse no prefix
constexpr int kMostRequests = 2000;
constexpr int kLongest = 2000;
constexpr int kClients = 12;

int RequestCount() {
  const char* wanted = std::getenv("TANDEM_EQUALITY_REQUESTS");
  if (wanted == nullptr) return kAllRequests;
  return std::clamp(std::atoi(wanted), kFewestRequests, kMostRequests);
}

std::vector<tandem::v1::GenerateRequest> MakeRequests(int count, int vocab) {
  std::mt19937_64 random(20260101);
  std::vector<tandem::v1::GenerateRequest> requests;
  std::vector<std::vector<uint32_t>> prompts;
  for (int i = 0; i < count; ++i) {
    // Log-uniform lengths, both ends included.
    const double u = std::uniform_real_distribution<double>(0, 1)(random);
    int length = static_cast<int>(std::exp(u * std::log(kLongest)));
    if (i == 0) length = 1;
    if (i == 1) length = kLongest;
    std::vector<uint32_t> prompt = RandomTokens(length, vocab, random());
    if (i % 3 == 2) {  // shares a prefix with an earlier prompt
      const auto& earlier = prompts[random() % prompts.size()];
      const size_t shared = std::min<size_t>(prompt.size(), random() % (earlier.size() + 1));
      std::copy_n(earlier.begin(), shared, prompt.begin());
    }
    if (i % 5 == 4) {  // repeats itself, as an answer to it may
      const size_t period = 2 + random() % 8;
      for (size_t p = period; p < prompt.size(); ++p) prompt[p] = prompt[p - period];
    }
    tandem::v1::GenerateRequest request = TokenRequest(prompt, 1 + static_cast<int>(random() % 24));
    auto* sampling = request.mutable_sampling();
    if (i % 2 == 1) {
      sampling->set_temperature(0.9f);
      sampling->set_top_p(0.95f);
      sampling->set_top_k(40);
      sampling->set_seed(1000 + i);
      if (i % 4 == 1) {
        sampling->set_repetition_penalty(1.1f);
        sampling->set_frequency_penalty(0.2f);
      }
    }
    prompts.push_back(std::move(prompt));
    requests.push_back(std::move(request));
  }
  return requests;
}

std::vector<Answer> RunAll(TestCluster& cluster,
                           const std::vector<tandem::v1::GenerateRequest>& requests) {
  TestClient client(cluster.channel());
  std::vector<Answer> answers(requests.size());
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kClients; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < requests.size(); i = next++)
        answers[i] = client.Generate(requests[i], 300);
    });
  }
  for (auto& thread : threads) thread.join();
  return answers;
}

struct Outcome {
  std::vector<Answer> answers;
  uint64_t kv_bytes = 0;
  uint64_t cached_tokens = 0;
  uint64_t drafted_tokens = 0;
  uint64_t accepted_tokens = 0;
  std::set<std::string> transports;  // that shipped something
};

struct Topology {
  int prefill = 0, decode = 0, unified = 0;
  std::string transport = "auto";
  std::string speculative = "none";
};

Outcome RunThrough(const Topology& topology, const std::vector<std::string>& flags, int requests) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.prefill = topology.prefill;
  spec.decode = topology.decode;
  spec.unified = topology.unified;
  // Everything but the unified run goes over the wire; small budgets, so that prompts are cut and
  // mixed.
  spec.worker_flags = {"--dtype=float32", "--max-num-batched-tokens=384", "--num-threads=1",
                       "--kv-cache-memory-bytes=256MiB", "--kv-transport=" + topology.transport};
  spec.worker_flags.insert(spec.worker_flags.end(), flags.begin(), flags.end());
  spec.decode_flags = {"--local-prefill-max-tokens=0", "--speculative=" + topology.speculative};
  spec.router_flags = {"--max-wait=300"};  // nobody is refused, however slow the machine
  auto cluster = TestCluster::Start(spec);
  Outcome run;
  if (cluster == nullptr) return run;
  TestClient client(cluster->channel());
  grpc::ClientContext context;
  tandem::v1::ListModelsResponse models;
  EXPECT_TRUE(client.stub().ListModels(&context, {}, &models).ok());
  run.answers =
      RunAll(*cluster, MakeRequests(requests, static_cast<int>(models.models(0).vocab_size())));
  for (const Answer& answer : run.answers) {
    run.kv_bytes += answer.timing.kv_bytes();
    run.cached_tokens += answer.usage.cached_tokens();
    run.drafted_tokens += answer.usage.drafted_tokens();
    run.accepted_tokens += answer.usage.accepted_tokens();
    if (answer.timing.kv_bytes() > 0) run.transports.insert(answer.timing.transport());
  }
  EXPECT_TRUE(cluster->WaitFor(
      [](const tandem::v1::GetClusterResponse& state) {
        for (const auto& worker : state.workers()) {
          if (worker.blocks_used() + worker.blocks_quarantined() + worker.running() +
                  worker.waiting() >
              0)
            return false;
        }
        return true;
      },
      10))
      << "blocks leaked:\n"
      << cluster->GetCluster().DebugString();
  return run;
}

void ExpectSame(const Outcome& a, const Outcome& b, const std::string& names) {
  ASSERT_EQ(a.answers.size(), b.answers.size()) << names;
  for (size_t i = 0; i < a.answers.size(); ++i) {
    const Answer &x = a.answers[i], &y = b.answers[i];
    ASSERT_TRUE(x.status.ok()) << names << " request " << i << ": " << x.status.error_message();
    ASSERT_TRUE(y.status.ok()) << names << " request " << i << ": " << y.status.error_message();
    EXPECT_EQ(x.token_ids, y.token_ids) << names << " request " << i;
    EXPECT_EQ(x.logprobs, y.logprobs) << names << " request " << i << ": same tokens, other bits";
    EXPECT_EQ(x.text, y.text) << names << " request " << i;
    EXPECT_EQ(x.finish_reason, y.finish_reason) << names << " request " << i;
  }
}

// What carries blocks where --kv-transport names `transport`.
std::string Carrier(const std::string& transport) {
  return OnGpu() && transport == "shm" ? "shm_ring" : transport;
}

void ExpectSameEverywhere(const std::vector<std::string>& flags, int requests) {
  const Outcome unified = RunThrough({.unified = 1}, flags, requests);
  ASSERT_EQ(unified.answers.size(), static_cast<size_t>(requests));
  EXPECT_EQ(unified.kv_bytes, 0u);
  const char* wanted = std::getenv("TANDEM_EQUALITY_TRANSPORT");
  const std::string first = wanted != nullptr ? wanted : "tcp";
  const Outcome one = RunThrough({.prefill = 1, .decode = 1, .transport = first}, flags, requests);
  ExpectSame(unified, one, "unified and 1 + 1");
  const std::string other = wanted != nullptr ? wanted : OnGpu() ? "cuda_ipc" : "shm";
  const Outcome two = RunThrough(
      {.prefill = 2, .decode = 2, .transport = other, .speculative = "ngram"}, flags, requests);
  ExpectSame(unified, two, "unified and 2 + 2");
  // "" is of what went by no wire at all.
  EXPECT_THAT(one.transports, ::testing::ElementsAre(Carrier(first)));
  EXPECT_THAT(two.transports, ::testing::ElementsAre(Carrier(other)));
  EXPECT_EQ(one.drafted_tokens, 0u);
  EXPECT_GT(two.accepted_tokens, 0u) << "nothing was drafted right";
  EXPECT_GT(two.drafted_tokens, two.accepted_tokens) << "nothing was drafted wrong";
  for (const Outcome* run : {&one, &two}) {
    EXPECT_GT(run->kv_bytes, 0u) << "nothing was shipped";
    EXPECT_GT(run->cached_tokens, 0u) << "no prefix was reused";
  }
}

TEST(Equality, TokensDoNotDependOnTopologyOrTransport) { ExpectSameEverywhere({}, RequestCount()); }

TEST(Equality, NorDoTheyWithKvAndWeightsInFp8) {
  std::vector<std::string> flags = {"--kv-cache-dtype=fp8"};
  if (!OnGpu()) flags.push_back("--quantization=fp8");
  ExpectSameEverywhere(flags, kFewestRequests);
}

}  // namespace
}  // namespace tandem
