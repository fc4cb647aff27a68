// A worker whose card fails: it ends with the call and the step, its requests go to others, and it
// comes back.
#include <cstdlib>
#include <signal.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/device/cuda/cuda_check.h"
#include "engine/device/cuda/cuda_device.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

TEST(CudaWorkerLoss, AFaultInTheMiddleOfAPromptLosesNoRequest) {
  if (const auto device = engine::cuda::CudaDevice::Open(0); !device.ok()) {
    GTEST_SKIP() << device.status();
  }
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/slow");
  spec.prefill = 2;
  // Many small steps, so that the fault lies in the middle of a prompt.
  spec.worker_flags = {"--load-format=dummy", "--kv-cache-memory-bytes=256MiB",
                       "--max-num-batched-tokens=128"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  setenv("TANDEM_TEST_WORKER_FLAGS", "--device=cuda", 1);
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto request = [](int seed) { return TokenRequest(RandomTokens(4000, 512, seed), 8); };
  const Answer before = client.Generate(request(0));
  ASSERT_TRUE(before.status.ok()) << before.status.error_message() << cluster->Logs();
  EXPECT_EQ(before.token_ids.size(), 8u);

  cluster->worker("prefill-0").process->Signal(SIGKILL);
  ASSERT_TRUE(cluster->WaitForWorkers(2, 10));
  setenv("TANDEM_CUDA_FAULT_STEP", "20", 1);
  cluster->StartWorker("prefill-0");
  unsetenv("TANDEM_CUDA_FAULT_STEP");
  ASSERT_TRUE(cluster->WaitForWorkers(3, 30)) << cluster->Logs();
  std::optional<int> exit_code;
  for (int seed = 1; seed < 20 && !exit_code; ++seed) {
    const Answer answer = client.Generate(request(seed));
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster->Logs();
    EXPECT_EQ(answer.token_ids.size(), 8u);
    EXPECT_EQ(answer.timing.prefill_worker(), "prefill-1");
    exit_code = cluster->worker("prefill-0").process->Wait(0.5);
  }
  EXPECT_EQ(exit_code, engine::cuda::kCudaErrorExit) << cluster->Logs();
  EXPECT_THAT(ReadWholeFile(cluster->worker("prefill-0").stderr_path),
              testing::HasSubstr("TANDEM_CUDA_FAULT_STEP: injected fault (CUDA; step 20)"));

  cluster->StartWorker("prefill-0");
  ASSERT_TRUE(cluster->WaitForWorkers(3, 30)) << cluster->Logs();
  const Answer after = client.Generate(request(0));
  ASSERT_TRUE(after.status.ok()) << after.status.error_message();
  EXPECT_EQ(after.token_ids, before.token_ids);
}

}  // namespace
}  // namespace tandem
