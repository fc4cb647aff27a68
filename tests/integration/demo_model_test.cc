// The demo model really answers: held-out prompts of each kind, through a cluster, greedily.
#include <algorithm>
#include <atomic>
#include <fstream>
#include <map>
#include <thread>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

constexpr int kOfEachKind = 64;

struct Prompt {
  std::string kind;
  tandem::v1::ChatRequest request;
  std::string answer;
};

std::vector<Prompt> HeldOut(int of_each_kind) {
  std::ifstream in(SourcePath("tests/data/demo/heldout.json"));
  std::vector<Prompt> prompts;
  std::map<std::string, int> of_kind;
  for (const auto& entry : nlohmann::json::parse(in)) {
    if (++of_kind[entry.at("kind")] > of_each_kind) continue;
    Prompt prompt{entry.at("kind"), {}, entry.at("expected")};
    for (const auto& message : entry.at("messages")) {
      auto* out = prompt.request.add_messages();
      out->set_role(message.at("role"));
      out->set_content(message.at("content"));
    }
    prompt.request.mutable_sampling()->set_temperature(0);
    prompts.push_back(std::move(prompt));
  }
  return prompts;
}

void CheckAnswers(const std::string& flag, int of_each_kind) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=128MiB", flag};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const std::vector<Prompt> prompts = HeldOut(of_each_kind);
  std::vector<std::string> answers(prompts.size());
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < prompts.size(); i = next++)
        answers[i] = client.Chat(prompts[i].request).text;
    });
  }
  for (auto& thread : threads) thread.join();
  std::map<std::string, std::pair<int, int>> right_of;
  for (size_t i = 0; i < prompts.size(); ++i) {
    auto& [right, total] = right_of[prompts[i].kind];
    right += answers[i] == prompts[i].answer;
    ++total;
  }
  EXPECT_EQ(right_of.size(), 8u);
  for (const auto& [kind, count] : right_of) {
    std::printf("%-24s %d of %d\n", kind.c_str(), count.first, count.second);
    EXPECT_EQ(count.second, of_each_kind) << kind;
    EXPECT_LE(count.second - count.first, std::max(1.0, 0.05 * count.second)) << kind;
  }
}

TEST(DemoModel, AnswersHeldOutPromptsOfEachKind) {
  CheckAnswers("--kv-cache-dtype=auto", SanitizerShare(kOfEachKind));
}

TEST(DemoModel, AnswersThemWithKvInFp8) {
  CheckAnswers("--kv-cache-dtype=fp8", SanitizerShare(kOfEachKind / 4));
}

TEST(DemoModel, AnswersThemWithWeightsInFp8) {
  if (OnGpu()) GTEST_SKIP() << "--quantization=fp8 is for CPUs";
  CheckAnswers("--quantization=fp8", SanitizerShare(kOfEachKind / 4));
}

}  // namespace
}  // namespace tandem
