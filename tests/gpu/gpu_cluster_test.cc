// Clusters whose workers share one card: KV blocks leave its memory and come back over tcp. What a
// prefill worker and a decode worker answer together is what a unified worker answers.
#include <atomic>
#include <cuda_runtime.h>
#include <fstream>
#include <thread>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

bool HaveCard() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

std::unique_ptr<TestCluster> StartOnCard(const std::string& model, int prefill, int decode,
                                         int unified) {
  ClusterSpec spec;
  spec.model_dir = SourcePath(model);
  spec.prefill = prefill;
  spec.decode = decode;
  spec.unified = unified;
  spec.worker_flags = {"--device=cuda", "--kv-cache-memory-bytes=128MiB"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  return TestCluster::Start(spec);
}

class GpuCluster : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HaveCard()) GTEST_SKIP() << "no CUDA card here";
  }
};

// One request at a time, so that both compute the same batches.
TEST_F(GpuCluster, SplitAndUnifiedAnswerTheSame) {
  const auto split = StartOnCard("models/demo", 1, 1, 0);
  const auto unified = StartOnCard("models/demo", 0, 0, 1);
  ASSERT_NE(split, nullptr);
  ASSERT_NE(unified, nullptr);
  TestClient split_client(split->channel()), unified_client(unified->channel());
  grpc::ClientContext context;
  tandem::v1::ListModelsResponse models;
  ASSERT_TRUE(split_client.stub().ListModels(&context, {}, &models).ok());
  const int vocab = static_cast<int>(models.models(0).vocab_size());
  int bits_differ = 0;
  for (const int length : {1, 2, 15, 16, 17, 33, 100, 128, 250, 511, 700, 1200}) {
    for (const bool greedy : {true, false}) {
      auto request =
          TokenRequest(RandomTokens(length, vocab, 7 * static_cast<uint64_t>(length)), 24);
      if (!greedy) {
        request.mutable_sampling()->set_temperature(0.9f);
        request.mutable_sampling()->set_seed(1000 + length);
      }
      const Answer a = split_client.Generate(request, 30);
      const Answer b = unified_client.Generate(request, 30);
      ASSERT_TRUE(a.status.ok()) << a.status.error_message() << "\n" << split->Logs();
      ASSERT_TRUE(b.status.ok()) << b.status.error_message() << "\n" << unified->Logs();
      EXPECT_EQ(a.token_ids, b.token_ids) << length << " tokens, greedy " << greedy;
      if (a.logprobs != b.logprobs) ++bits_differ;
      if (greedy) {
        EXPECT_EQ(a.timing.transport(), "tcp");
        EXPECT_GT(a.timing.kv_bytes(), 0u) << length;
      }
    }
  }
  std::printf("%d of 24 answers with other bits in their logprobs\n", bits_differ);
  if (HasFailure()) std::printf("%s\n", split->Logs().c_str());
}

TEST_F(GpuCluster, AnswersHeldOutPrompts) {
  const auto cluster = StartOnCard("models/demo", 1, 1, 0);
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  std::ifstream in(SourcePath("tests/data/demo/heldout.json"));
  const auto prompts = nlohmann::json::parse(in);
  std::vector<std::string> answers(prompts.size());
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 32; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < prompts.size(); i = next++) {
        tandem::v1::ChatRequest request;
        for (const auto& message : prompts[i].at("messages")) {
          auto* out = request.add_messages();
          out->set_role(message.at("role"));
          out->set_content(message.at("content"));
        }
        request.mutable_sampling()->set_temperature(0);
        answers[i] = client.Chat(request, 30).text;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  size_t right = 0;
  for (size_t i = 0; i < prompts.size(); ++i) right += answers[i] == prompts[i].at("expected");
  std::printf("%zu of %zu held-out prompts\n", right, prompts.size());
  EXPECT_GE(static_cast<double>(right), 0.95 * static_cast<double>(prompts.size()))
      << cluster->Logs();
}

}  // namespace
}  // namespace tandem
