// Workers that keep KV in fp8: they ship fewer bytes, hold more tokens, answer nearly as others do,
// and do not pair with those.
#include <algorithm>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class Fp8Kv : public testing::Test {
 protected:
  void SetUp() override {
    if (OnGpu()) GTEST_SKIP() << "counts in float32, which GPUs do not compute in";
  }
};

ClusterSpec DemoCluster(const std::string& kv_cache_dtype) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=32MiB",
                       "--kv-cache-dtype=" + kv_cache_dtype};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  return spec;
}

TEST_F(Fp8Kv, ShipsAFourthOfFloat32AndHoldsFourTimesTheTokens) {
  const auto plain = TestCluster::Start(DemoCluster("auto"));
  const auto fp8 = TestCluster::Start(DemoCluster("fp8"));
  ASSERT_NE(plain, nullptr);
  ASSERT_NE(fp8, nullptr);
  const auto request = TokenRequest(RandomTokens(300, kDemoVocab, 1), 4);
  const Answer of_plain = TestClient(plain->channel()).Generate(request);
  const Answer of_fp8 = TestClient(fp8->channel()).Generate(request);
  ASSERT_TRUE(of_plain.status.ok()) << of_plain.status.error_message();
  ASSERT_TRUE(of_fp8.status.ok()) << of_fp8.status.error_message();
  EXPECT_GT(of_fp8.timing.kv_bytes(), 0u);
  EXPECT_EQ(4 * of_fp8.timing.kv_bytes(), of_plain.timing.kv_bytes());
  const v1::GetClusterResponse state = fp8->GetCluster(), plain_state = plain->GetCluster();
  ASSERT_EQ(state.workers_size(), 2);
  for (int i = 0; i < state.workers_size(); ++i) {
    EXPECT_EQ(state.workers(i).blocks_total(), 4 * plain_state.workers(i).blocks_total());
  }
  EXPECT_THAT(state.capability(), HasSubstr("float32, kv fp8"));
  EXPECT_THAT(TestCluster::Scrape(fp8->worker("decode-0")), HasSubstr("dtype=\"fp8\""));
}

TEST_F(Fp8Kv, RefusesAWorkerWhoseKvIsAnother) {
  ClusterSpec spec = DemoCluster("auto");
  spec.prefill = spec.decode = 0;
  spec.unified = 1;
  spec.decode_flags = {"--kv-cache-dtype=fp8"};  // of the unified worker
  spec.router_flags = {"--kv-cache-dtype=fp8"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  cluster->StartWorker("prefill-0");
  Member& refused = cluster->worker("prefill-0");
  EXPECT_THAT(refused.process->Wait(60), testing::Optional(testing::Ne(0)));
  EXPECT_THAT(ReadWholeFile(refused.stderr_path),
              AllOf(HasSubstr("kv_dtype: this worker float32, cluster fp8"),
                    HasSubstr("start it with --kv-cache-dtype=fp8")));
}

}  // namespace
}  // namespace tandem
