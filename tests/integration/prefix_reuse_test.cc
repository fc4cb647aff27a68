// Second turns cost only their new tokens, and a salt keeps caches apart.
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

ClusterSpec SmallCluster() {
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/small");
  spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                       "--kv-cache-memory-bytes=64MiB"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  return spec;
}

std::vector<uint32_t> Extend(std::vector<uint32_t> prompt, const Answer& answer, int more,
                             uint64_t seed) {
  prompt.insert(prompt.end(), answer.token_ids.begin(), answer.token_ids.end());
  const auto tail = RandomTokens(more, 512, seed);
  prompt.insert(prompt.end(), tail.begin(), tail.end());
  return prompt;
}

TEST(PrefixReuse, SecondTurnShipsOnlyWhatDecodeDoesNotHold) {
  auto cluster = TestCluster::Start(SmallCluster());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto first_prompt = RandomTokens(400, 512, 1);
  const Answer first = client.Generate(TokenRequest(first_prompt, 20));
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  EXPECT_EQ(first.usage.cached_tokens(), 0u);
  EXPECT_EQ(first.timing.transport(), OnGpu() ? "cuda_ipc" : "shm");

  const auto second_prompt = Extend(first_prompt, first, 40, 2);
  const Answer second = client.Generate(TokenRequest(second_prompt, 20));
  ASSERT_TRUE(second.status.ok()) << second.status.error_message();
  EXPECT_GE(second.usage.cached_tokens(), 400u / 16 * 16);
  // 460 tokens are 29 blocks; decode held the 26 that turn 1 filled.
  EXPECT_LT(second.timing.kv_bytes(), first.timing.kv_bytes() / 4);
  EXPECT_GT(second.timing.kv_bytes(), 0u);

  // What was reused gives the tokens that a fresh computation gives.
  auto fresh = TestCluster::Start(SmallCluster());
  ASSERT_NE(fresh, nullptr);
  const Answer expected = TestClient(fresh->channel()).Generate(TokenRequest(second_prompt, 20));
  EXPECT_EQ(second.token_ids, expected.token_ids);
  EXPECT_EQ(second.logprobs, expected.logprobs);
}

ClusterSpec WithFp8Kv(ClusterSpec spec) {
  spec.worker_flags.push_back("--kv-cache-dtype=fp8");
  return spec;
}

// Steps that take their time make computing dear, so that whatever the link of a busy machine
// reaches, it is the better way.
ClusterSpec SlowPrefill() {
  ClusterSpec spec = SmallCluster();
  spec.prefill_flags = {"--min-step-ms=200", "--max-num-batched-tokens=64",
                        "--kv-return-timeout=60"};
  return spec;
}

uint64_t CachedBlocks(const v1::GetClusterResponse& state, const std::string& role) {
  uint64_t blocks = 0;
  for (const auto& worker : state.workers()) {
    if (worker.role() == role) blocks += worker.blocks_cached();
  }
  return blocks;
}

// What the last turn's answer is goes back to the prefill worker, which computes the new tokens.
void CheckReturnedAnswer(ClusterSpec (*of_kind)(ClusterSpec)) {
  auto cluster = TestCluster::Start(of_kind(SlowPrefill()));
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto first_prompt = RandomTokens(100, 512, 1);
  const Answer first = client.Generate(TokenRequest(first_prompt, 200));
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  EXPECT_EQ(first.timing.returned_tokens(), 0u);
  // 299 tokens have their KV: 18 blocks.
  ASSERT_TRUE(
      cluster->WaitFor([](const auto& state) { return CachedBlocks(state, "decode") >= 18; }, 30));
  const auto second_prompt = Extend(first_prompt, first, 60, 2);
  const Answer second = client.Generate(TokenRequest(second_prompt, 20));
  ASSERT_TRUE(second.status.ok()) << second.status.error_message();
  // Of 100 tokens the prefill worker had 6 blocks.
  EXPECT_EQ(second.timing.returned_tokens(), (18 - 6) * 16u);
  EXPECT_EQ(second.usage.cached_tokens(), 18 * 16u);
  EXPECT_GT(second.timing.kv_return(), 0);
  EXPECT_EQ(second.timing.prefill_attempts(), 1u);

  ClusterSpec unified = of_kind(SmallCluster());
  unified.prefill = unified.decode = 0;
  unified.unified = 1;
  auto one = TestCluster::Start(unified);
  ASSERT_NE(one, nullptr);
  const Answer expected = TestClient(one->channel()).Generate(TokenRequest(second_prompt, 20));
  EXPECT_EQ(second.token_ids, expected.token_ids);
  EXPECT_EQ(second.logprobs, expected.logprobs);
}

TEST(PrefixReuse, ASecondTurnComputesNothingButItsNewTokens) {
  CheckReturnedAnswer([](ClusterSpec spec) { return spec; });
}

TEST(PrefixReuse, NorWithKvInFp8) { CheckReturnedAnswer(WithFp8Kv); }

TEST(PrefixReuse, DecodeServesAShortSecondTurnFromItsOwnCache) {
  ClusterSpec spec = SmallCluster();
  spec.decode_flags = {"--local-prefill-max-tokens=64"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto first_prompt = RandomTokens(400, 512, 1);
  const Answer first = client.Generate(TokenRequest(first_prompt, 20));
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  // Block events reach the router with the worker's next report.
  ASSERT_TRUE(cluster->WaitFor(
      [](const auto& state) {
        for (const auto& worker : state.workers()) {
          if (worker.role() == "decode" && worker.blocks_cached() < 26) return false;
        }
        return true;
      },
      10));
  const Answer second = client.Generate(TokenRequest(Extend(first_prompt, first, 10, 2), 20));
  ASSERT_TRUE(second.status.ok()) << second.status.error_message();
  EXPECT_EQ(second.timing.transport(), "local");
  EXPECT_EQ(second.timing.kv_bytes(), 0u);
  // The answer's own blocks are reused too: all full blocks of the 419 tokens whose KV turn 1 left
  // behind.
  EXPECT_EQ(second.usage.cached_tokens(), 416u);
}

TEST(PrefixReuse, PromptLogprobsAreCompleteThoughThePrefixIsCached) {
  auto cluster = TestCluster::Start(SmallCluster());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  auto request = TokenRequest(RandomTokens(100, 512, 3), 4);
  ASSERT_TRUE(client.Generate(request).status.ok());
  request.mutable_sampling()->set_prompt_logprobs(2);
  grpc::ClientContext context;
  auto reader = client.stub().Generate(&context, request);
  tandem::v1::GenerateResponse message;
  int logprobs = 0;
  while (reader->Read(&message)) {
    logprobs += message.prompt_logprobs_size();
    for (const auto& entry : message.prompt_logprobs()) EXPECT_EQ(entry.top_size(), 2);
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(logprobs, 99);
}

TEST(PrefixReuse, SaltKeepsPrefixesApart) {
  auto cluster = TestCluster::Start(SmallCluster());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  auto request = TokenRequest(RandomTokens(320, 512, 5), 4);
  ASSERT_TRUE(client.Generate(request).status.ok());
  request.mutable_options()->set_cache_salt("tenant-b");
  const Answer salted = client.Generate(request);
  ASSERT_TRUE(salted.status.ok());
  EXPECT_EQ(salted.usage.cached_tokens(), 0u);
  EXPECT_GE(client.Generate(request).usage.cached_tokens(), 304u);
}

}  // namespace
}  // namespace tandem
