// Workers whose models are split over different numbers of ranks: the tokens are those of a whole
// model, and blocks fit whoever computed them, also when they go back.
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using Flags = std::vector<std::string>;

std::vector<Answer> Ask(ClusterSpec spec) {
  spec.model_dir = SourcePath("models/demo");
  spec.worker_flags = {"--dtype=float32", "--num-threads=2", "--kv-cache-memory-bytes=64MiB"};
  const auto cluster = TestCluster::Start(spec);
  std::vector<Answer> answers;
  if (cluster == nullptr) return answers;
  TestClient client(cluster->channel());
  for (const int length : {3, 40, 129, 300}) {
    std::vector<uint32_t> prompt = RandomTokens(length, 2000, static_cast<uint64_t>(length));
    for (int turn = 0; turn < 2; ++turn) {
      tandem::v1::GenerateRequest request = TokenRequest(prompt, 40);
      if (length == 129) {
        request.mutable_sampling()->set_temperature(0.8f);
        request.mutable_sampling()->set_seed(5);
      }
      const Answer answer = client.Generate(request, 120);
      EXPECT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster->Logs();
      answers.push_back(answer);
      // The next turn of the conversation: its answer may be given back.
      prompt.insert(prompt.end(), answer.token_ids.begin(), answer.token_ids.end());
      const std::vector<uint32_t> more = RandomTokens(20, 2000, 99);
      prompt.insert(prompt.end(), more.begin(), more.end());
    }
  }
  return answers;
}

void ExpectSame(const std::vector<Answer>& a, const std::vector<Answer>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].token_ids, b[i].token_ids) << "answer " << i;
    ASSERT_EQ(a[i].logprobs.size(), b[i].logprobs.size());
    for (size_t t = 0; t < a[i].logprobs.size(); ++t) {
      EXPECT_NEAR(a[i].logprobs[t], b[i].logprobs[t], 1e-3) << "answer " << i << " token " << t;
    }
  }
}

TEST(TensorParallel, WorkersSplitInDifferentWaysAnswerAlike) {
  // Computing is so dear that blocks come back for the next turn, over whatever link.
  const Flags dear = {"--min-step-ms=100", "--max-num-batched-tokens=64",
                      "--kv-return-timeout=120"};
  const Flags two_ranks = {"--tensor-parallel-size=2"};
  Flags dear_on_two = dear;
  dear_on_two.insert(dear_on_two.end(), two_ranks.begin(), two_ranks.end());
  // Nothing is computed where it is decoded.
  const Flags remote = {"--local-prefill-max-tokens=0"};
  Flags remote_of_two = remote;
  remote_of_two.insert(remote_of_two.end(), two_ranks.begin(), two_ranks.end());
  const std::vector<Answer> whole = Ask({.prefill = 0, .decode = 0, .unified = 1});
  ASSERT_EQ(whole.size(), 8u);
  for (const auto& [prefill, decode] : {std::pair{dear_on_two, remote}, {dear, remote_of_two}}) {
    const std::vector<Answer> split = Ask({.decode_flags = decode, .prefill_flags = prefill});
    ExpectSame(split, whole);
    uint64_t shipped = 0, cached = 0, returned = 0;
    for (const Answer& answer : split) {
      shipped += answer.timing.kv_bytes();
      cached += answer.usage.cached_tokens();
      returned += answer.timing.returned_tokens();
    }
    EXPECT_GT(shipped, 0u);
    EXPECT_GT(cached, 0u);
    EXPECT_GT(returned, 0u);
  }
}

}  // namespace
}  // namespace tandem
