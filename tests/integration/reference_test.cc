// Reference checkpoints through a 1 + 1 cluster, asked by a client in another language: greedy
// tokens, logprobs and prompt logprobs equal Hugging Face's (float64).
#include <filesystem>

#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

void ExpectReference(const std::string& model_dir) {
  ClusterSpec spec;
  spec.model_dir = model_dir;
  spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  const Completed client =
      RunCommand({"/usr/bin/python3", SourcePath("tests/integration/foreign_client.py"),
                  SourcePath("proto"), cluster->address(), model_dir + "/reference.json"},
                 300);
  EXPECT_EQ(client.exit_code, 0) << client.out << client.err;
}

class SharedReference : public testing::TestWithParam<const char*> {};

TEST_P(SharedReference, GreedyTokensAndLogprobsEqualHuggingFace) {
  TANDEM_REQUIRE_SHARED();
  ExpectReference(SharedDir() + "/reference/" + GetParam());
}

INSTANTIATE_TEST_SUITE_P(All, SharedReference,
                         testing::Values("tiny-gqa7", "tiny-mha", "tiny-tied", "tiny-yarn",
                                         "tiny-hd128"));

TEST(CommittedReference, GreedyTokensAndLogprobsEqualHuggingFace) {
  int models = 0;
  for (const auto& entry : std::filesystem::directory_iterator(SourcePath("tests/data/engine"))) {
    if (!std::filesystem::exists(entry.path() / "reference.json")) continue;
    SCOPED_TRACE(entry.path().string());
    ExpectReference(entry.path().string());
    ++models;
  }
  EXPECT_GT(models, 0);
}

}  // namespace
}  // namespace tandem
