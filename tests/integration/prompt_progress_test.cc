// How far a long prompt is, told through a whole cluster to the client who asks.
#include <optional>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

// What a client heard in its stream.
struct Heard {
  grpc::Status status;
  std::vector<uint32_t> computed;  // in the order of the messages
  uint32_t total = 0;
  std::vector<uint32_t> token_ids;
  bool progress_after_token = false;
};

class PromptProgress : public testing::TestWithParam<bool> {
 protected:
  // Seven steps of 64 tokens for a prompt of 400.
  static ClusterSpec Spec() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("tests/data/models/small");
    spec.prefill = GetParam() ? 0 : 1;
    spec.decode = GetParam() ? 0 : 1;
    spec.unified = GetParam() ? 1 : 0;
    spec.worker_flags = {"--load-format=dummy",
                         "--dtype=float32",
                         "--num-threads=1",
                         "--kv-cache-memory-bytes=64MiB",
                         "--max-num-batched-tokens=64",
                         "--max-num-seqs=8",
                         "--min-step-ms=20"};
    return spec;
  }
  static Heard Ask(const TestCluster& cluster, const std::vector<uint32_t>& prompt, bool progress) {
    v1::GenerateRequest request = TokenRequest(prompt, 3);
    request.mutable_options()->set_progress(progress);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(120));
    const auto stub = v1::Inference::NewStub(cluster.channel());
    const auto reader = stub->Generate(&context, request);
    Heard heard;
    v1::GenerateResponse message;
    while (reader->Read(&message)) {
      heard.token_ids.insert(heard.token_ids.end(), message.token_ids().begin(),
                             message.token_ids().end());
      if (!message.has_progress()) continue;
      if (!heard.token_ids.empty()) heard.progress_after_token = true;
      heard.computed.push_back(message.progress().computed_tokens());
      heard.total = message.progress().total_tokens();
    }
    heard.status = reader->Finish();
    return heard;
  }
  static void ExpectInOrder(const Heard& heard, size_t prompt) {
    ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
    EXPECT_EQ(heard.token_ids.size(), 3u);
    EXPECT_FALSE(heard.progress_after_token);
    for (size_t i = 1; i < heard.computed.size(); ++i) {
      EXPECT_LT(heard.computed[i - 1], heard.computed[i]) << "message " << i;
    }
    if (heard.computed.empty()) return;
    EXPECT_LT(heard.computed.back(), prompt);
    EXPECT_EQ(heard.total, prompt);
  }
};

INSTANTIATE_TEST_SUITE_P(Roles, PromptProgress, testing::Bool(), [](const auto& info) {
  return info.param ? "Unified" : "PrefillAndDecode";
});

// Messages that a busy machine is late with are merged, and tokens overtake them: so several
// prompts, until one was told of more than one step.
TEST_P(PromptProgress, GrowsUntilTheFirstTokenForThoseWhoAsk) {
  const auto cluster = TestCluster::Start(Spec());
  ASSERT_NE(cluster, nullptr);
  std::optional<std::vector<uint32_t>> told;
  for (uint64_t seed = 1; !told.has_value() && seed <= 20; ++seed) {
    const std::vector<uint32_t> prompt = RandomTokens(400, 512, seed);
    const Heard heard = Ask(*cluster, prompt, true);
    ExpectInOrder(heard, prompt.size());
    if (heard.computed.size() < 3) continue;
    told = prompt;
    const Heard silent = Ask(*cluster, RandomTokens(400, 512, 100 + seed), false);
    ExpectInOrder(silent, prompt.size());
    EXPECT_TRUE(silent.computed.empty());
  }
  ASSERT_TRUE(told.has_value()) << "20 prompts of seven steps, and of none more than two were told";

  // What is cached counts as computed.
  for (const uint32_t token : RandomTokens(200, 512, 50)) told->push_back(token);
  const Heard again = Ask(*cluster, *told, true);
  ExpectInOrder(again, told->size());
  for (const uint32_t computed : again.computed) EXPECT_GE(computed, 400u / 16 * 16);
}

}  // namespace
}  // namespace tandem
