// Clusters whose workers share one card: KV blocks travel from pool to pool of its memory over
// cuda_ipc, or leave it and come back over tcp, over shm, or over NCCL's sockets. What a prefill
// worker and a decode worker answer together is what a unified worker answers.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cuda_runtime.h>
#include <filesystem>
#include <fstream>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "common/cuda/cuda_library.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

bool HaveCard() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

using Flags = std::vector<std::string>;

// A worker's model on two ranks, which share the card.
const Flags kTwoRanks = {"--tensor-parallel-size=2", "--devices=0,0"};

std::unique_ptr<TestCluster> StartOnCard(const std::string& model, int prefill, int decode,
                                         int unified, const std::string& pool = "128MiB",
                                         const Flags& flags = {}, const Flags& prefill_flags = {},
                                         const Flags& decode_flags = {}) {
  ClusterSpec spec;
  spec.model_dir = model;
  spec.prefill = prefill;
  spec.decode = decode;
  spec.unified = unified;
  spec.worker_flags = {"--device=cuda", "--kv-cache-memory-bytes=" + pool};
  if (!std::filesystem::exists(model + "/model.safetensors")) {
    spec.worker_flags.push_back("--load-format=dummy");
  }
  spec.worker_flags.insert(spec.worker_flags.end(), flags.begin(), flags.end());
  spec.prefill_flags = prefill_flags;
  spec.decode_flags = decode_flags;
  spec.decode_flags.push_back("--local-prefill-max-tokens=0");
  return TestCluster::Start(spec);
}

class GpuCluster : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HaveCard()) GTEST_SKIP() << "no CUDA card here";
  }
  uint64_t requests_ = 0;
};

TEST_F(GpuCluster, WorkersTellOfTheirCard) {
  const auto cluster = StartOnCard(SourcePath("models/demo"), 0, 0, 1);
  ASSERT_NE(cluster, nullptr);
  const std::string page = TestCluster::Scrape(cluster->worker("unified-0"));
  for (const char* name :
       {"memory_bytes", "memory_used_bytes", "utilization_ratio", "power_watts"}) {
    EXPECT_THAT(page, testing::HasSubstr(std::string("\ntandem_gpu_") + name + "{"));
  }
}

// Bit for bit, which only --batch-invariant promises: otherwise each process chooses the products
// that were the fastest when it started.
void ExpectSameAnswers(const std::string& model, const std::string& transport,
                       const std::string& carrier, Flags flags = {}) {
  flags.push_back("--batch-invariant");
  const auto unified = StartOnCard(model, 0, 0, 1, "128MiB", flags);
  flags.push_back("--kv-transport=" + transport);
  const auto split = StartOnCard(model, 1, 1, 0, "128MiB", flags);
  ASSERT_NE(split, nullptr);
  ASSERT_NE(unified, nullptr);
  TestClient split_client(split->channel()), unified_client(unified->channel());
  grpc::ClientContext context;
  tandem::v1::ListModelsResponse models;
  ASSERT_TRUE(split_client.stub().ListModels(&context, {}, &models).ok());
  const int vocab = static_cast<int>(models.models(0).vocab_size());
  const int longest = static_cast<int>(models.models(0).max_model_len()) - 24;
  for (const int wanted : {1, 2, 15, 16, 17, 33, 100, 128, 250, 511, 700, 1200}) {
    const int length = std::min(wanted, longest);
    for (const bool greedy : {true, false}) {
      // Different prompts, so that nothing is cached where one was cut short.
      const auto seed = static_cast<uint64_t>(2 * wanted + (greedy ? 1 : 0));
      auto request = TokenRequest(RandomTokens(length, vocab, seed), 24);
      if (!greedy) {
        request.mutable_sampling()->set_temperature(0.9f);
        request.mutable_sampling()->set_seed(1000 + wanted);
      }
      const Answer a = split_client.Generate(request, 30);
      const Answer b = unified_client.Generate(request, 30);
      ASSERT_TRUE(a.status.ok()) << a.status.error_message() << split->Logs();
      ASSERT_TRUE(b.status.ok()) << b.status.error_message() << unified->Logs();
      EXPECT_EQ(a.token_ids, b.token_ids) << length << " tokens, greedy " << greedy;
      EXPECT_EQ(a.logprobs, b.logprobs) << length << " tokens, greedy " << greedy;
      EXPECT_EQ(a.timing.transport(), carrier);
      EXPECT_GT(a.timing.kv_bytes(), 0u) << length;
    }
  }
  if (::testing::Test::HasFailure()) std::printf("%s\n", split->Logs().c_str());
}

TEST_F(GpuCluster, SplitAndUnifiedAnswerTheSame) {
  ExpectSameAnswers(SourcePath("models/demo"), "auto", "cuda_ipc");
}

TEST_F(GpuCluster, SplitAndUnifiedAnswerTheSameOverTcp) {
  ExpectSameAnswers(SourcePath("models/demo"), "tcp", "tcp");
}

// As between cards without peer access.
TEST_F(GpuCluster, SplitAndUnifiedAnswerTheSameOverShm) {
  ExpectSameAnswers(SourcePath("models/demo"), "shm", "shm_ring");
}

// As between cards of different hosts.
TEST_F(GpuCluster, SplitAndUnifiedAnswerTheSameOverNccl) {
  const auto library = ::tandem::cuda::OpenCudaLibrary("libnccl.so.2");
  if (!library.ok()) GTEST_SKIP() << library.status();
  ExpectSameAnswers(SourcePath("models/demo"), "nccl", "nccl");
}

TEST_F(GpuCluster, SplitAndUnifiedOfTwoRanksAnswerTheSame) {
  ExpectSameAnswers(SourcePath("models/demo"), "tcp", "tcp", kTwoRanks);
}

// Heads of 64 and 128, one query head a KV head and seven, YaRN, tied embeddings.
class GpuClusterOf : public GpuCluster, public ::testing::WithParamInterface<std::string> {};
TEST_P(GpuClusterOf, SplitAndUnifiedAnswerTheSame) {
  if (SharedDir().empty()) GTEST_SKIP() << "the reference models are not here";
  ExpectSameAnswers(SharedDir() + "/reference/" + GetParam(), "cuda_ipc", "cuda_ipc");
}
INSTANTIATE_TEST_SUITE_P(Reference, GpuClusterOf,
                         ::testing::Values("tiny-gqa7", "tiny-mha", "tiny-tied", "tiny-yarn",
                                           "tiny-hd128"),
                         [](const auto& info) { return info.param.substr(5); });

// For the log: what shipping costs a model of real size. TANDEM_GPU_TEST_MODEL names its folder.
TEST_F(GpuCluster, SaysWhatShippingCosts) {
  const char* model = std::getenv("TANDEM_GPU_TEST_MODEL");
  if (model == nullptr) GTEST_SKIP() << "TANDEM_GPU_TEST_MODEL is not set";
  for (const bool split : {true, false}) {
    const auto started = std::chrono::steady_clock::now();
    const auto cluster = StartOnCard(model, split ? 1 : 0, split ? 1 : 0, split ? 0 : 1, "2GiB");
    ASSERT_NE(cluster, nullptr);
    const std::chrono::duration<double> start = std::chrono::steady_clock::now() - started;
    std::printf("%s: ready after %.1f s\n", split ? "1 + 1" : "unified", start.count());
    TestClient client(cluster->channel());
    for (const int length : {64, 512, 2048, 2048, 8192, 8192}) {
      const uint64_t seed = static_cast<uint64_t>(length) + (split ? 1 : 0) + (++requests_);
      const Answer a = client.Generate(TokenRequest(RandomTokens(length, 150'000, seed), 8), 60);
      ASSERT_TRUE(a.status.ok()) << a.status.error_message() << cluster->Logs();
      std::printf(
          "  %5d tokens: ttft %7.1f ms, prefill %7.1f ms, transfer %6.1f ms (%5.1f MB), of which "
          "after the first token %5.1f ms, second token after %5.1f ms\n",
          length, a.timing.ttft(), a.timing.prefill(), a.timing.kv_transfer_total(),
          static_cast<double>(a.timing.kv_bytes()) / 1e6, a.timing.kv_transfer_exposed(),
          a.timing.first_decode_step());
    }
  }
}

void ExpectRightAnswers(TestCluster* cluster) {
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

TEST_F(GpuCluster, AnswersHeldOutPrompts) {
  ExpectRightAnswers(StartOnCard(SourcePath("models/demo"), 1, 1, 0).get());
}

TEST_F(GpuCluster, AnswersHeldOutPromptsWithTwoRanksThatPrefill) {
  ExpectRightAnswers(
      StartOnCard(SourcePath("models/demo"), 1, 1, 0, "128MiB", {}, kTwoRanks).get());
}

TEST_F(GpuCluster, AnswersHeldOutPromptsWithTwoRanksThatDecode) {
  ExpectRightAnswers(
      StartOnCard(SourcePath("models/demo"), 1, 1, 0, "128MiB", {}, {}, kTwoRanks).get());
}

}  // namespace
}  // namespace tandem
