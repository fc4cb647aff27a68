// Two routers over the same workers: a request may come through any, and what becomes of one router
// is nothing to the requests of the other.
#include <algorithm>
#include <cstdio>
#include <future>
#include <memory>
#include <signal.h>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/checked_load.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

class SeveralRouters : public testing::Test {
 protected:
  static constexpr int kWorkers = 4;
  static constexpr double kPatience = 60;

  static std::vector<std::string> WorkerFlags() {
    return {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=128MiB"};
  }

  static ClusterSpec TwoRouters() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("models/demo");
    spec.routers = 2;
    spec.prefill = 2;
    spec.decode = 2;
    spec.worker_flags = WorkerFlags();
    // Streams last longer than reports take.
    spec.worker_flags.push_back("--min-step-ms=10");
    spec.decode_flags = {"--local-prefill-max-tokens=16"};
    return spec;
  }

  // Of the same model, with nobody to disturb it.
  static std::unique_ptr<TestCluster> StartUndisturbed() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("models/demo");
    spec.prefill = spec.decode = 0;
    spec.unified = 1;
    spec.worker_flags = WorkerFlags();
    return TestCluster::Start(spec);
  }

  // Of the router's own.
  static bool SomeRun(const v1::GetClusterResponse& state) { return state.running_requests() >= 2; }

  static bool NothingHeld(const v1::GetClusterResponse& state) {
    return std::all_of(state.workers().begin(), state.workers().end(), [](const auto& worker) {
      return worker.blocks_used() + worker.blocks_quarantined() + worker.running() +
                 worker.waiting() ==
             0;
    });
  }
};

TEST_F(SeveralRouters, ServeTheSameTokensAndKnowTheSameBlocks) {
  const auto undisturbed = StartUndisturbed();
  const auto cluster = TestCluster::Start(TwoRouters());
  ASSERT_TRUE(undisturbed != nullptr && cluster != nullptr);
  std::vector<TestClient> clients;
  for (size_t i = 0; i < 2; ++i) clients.emplace_back(cluster->channel(i));
  TestClient alone(undisturbed->channel());
  // What one router had computed, the other one finds.
  for (const size_t first : {0, 1}) {
    for (const size_t router : {first, 1 - first}) {
      ASSERT_TRUE(cluster->WaitFor(NothingHeld, kPatience, router));
      for (uint64_t i = 0; i < 4; ++i) {
        SCOPED_TRACE(testing::Message() << "prompt " << i << ", router " << router);
        const v1::GenerateRequest request =
            TokenRequest(RandomTokens(300, kDemoVocab, 4 * first + i), 24);
        const Answer right = alone.Generate(request);
        const Answer answer = clients[router].Generate(request);
        ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster->Logs();
        EXPECT_EQ(answer.token_ids, right.token_ids);
        EXPECT_EQ(answer.logprobs, right.logprobs);
        EXPECT_EQ(answer.text, right.text);
        EXPECT_EQ(answer.usage.cached_tokens() > 0, router != first);
      }
    }
  }
}

TEST_F(SeveralRouters, OneKilledUnderLoadTakesOnlyItsOwnRequestsAlong) {
  const auto undisturbed = StartUndisturbed();
  const auto cluster = TestCluster::Start(TwoRouters());
  ASSERT_TRUE(undisturbed != nullptr && cluster != nullptr);

  LoadOptions options;
  options.address = cluster->address(0);
  options.other_address = cluster->address(1);
  options.undisturbed = undisturbed->channel();
  options.vocab = kDemoVocab;
  options.longest_prompt = 600;
  options.longest_answer = SanitizerSlowsBy() > 1 ? 200 : 600;
  options.clients = 6;  // three at each router
  options.seed = 1;
  CheckedLoad load(options);
  for (int round = 0; round < 2; ++round) {
    for (const size_t router : {1, 0}) {
      EXPECT_TRUE(cluster->WaitFor(SomeRun, kPatience, router)) << cluster->Logs();
    }
    cluster->router(0).process->Signal(SIGKILL);
    cluster->router(0).process->Wait(kPatience);
    cluster->StartRouter(0);
    EXPECT_TRUE(cluster->WaitForWorkers(kWorkers, kPatience)) << cluster->Logs();
  }
  load.Stop();
  const LoadTotals totals = load.totals();
  std::printf("%s\n", totals.ToString().c_str());
  for (const std::string& wrong : totals.wrong) ADD_FAILURE() << wrong;
  EXPECT_EQ(totals.by_status.at("OK"), totals.requests);
  EXPECT_GE(totals.asked_elsewhere, 2);  // and mostly 6
  EXPECT_EQ(totals.migrations, 0);       // of those that the other router had
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(cluster->WaitFor(NothingHeld, kPatience, i))
        << cluster->GetCluster(i).DebugString() << cluster->Logs();
  }
  // The one that came back serves as before.
  TestClient client(cluster->channel(0));
  const Answer answer = client.Generate(TokenRequest(RandomTokens(100, kDemoVocab, 9), 8));
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
}

// Whichever router hears of it, no router sends more, and the streams of all go on elsewhere.
TEST_F(SeveralRouters, ADrainIsOneForAll) {
  ClusterSpec spec = TwoRouters();
  spec.worker_flags.push_back("--drain-timeout=0.5");
  const auto undisturbed = StartUndisturbed();
  const auto cluster = TestCluster::Start(spec);
  ASSERT_TRUE(undisturbed != nullptr && cluster != nullptr);
  std::vector<v1::GenerateRequest> requests;
  std::vector<std::future<Answer>> answers;
  for (size_t i = 0; i < 8; ++i) {
    requests.push_back(TokenRequest(RandomTokens(40, kDemoVocab, 100 + i), 300));
    answers.push_back(std::async(std::launch::async, [&cluster, request = requests[i], i] {
      return TestClient(cluster->channel(i % 2)).Generate(request, 240);
    }));
  }
  ASSERT_TRUE(cluster->WaitForStreams(8, kPatience)) << cluster->GetCluster().DebugString();
  const auto admin = v1::Admin::NewStub(cluster->admin_channel(0));
  grpc::ClientContext context;
  v1::DrainWorkerRequest drain;
  drain.set_worker_id("decode-0");
  v1::DrainWorkerResponse drained;
  const grpc::Status status = admin->DrainWorker(&context, drain, &drained);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(cluster->worker("decode-0").process->Wait(kPatience), 0);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(cluster->WaitForWorkers(kWorkers - 1, kPatience, i)) << i;
  }
  TestClient alone(undisturbed->channel());
  std::vector<uint32_t> moved(2);
  for (size_t i = 0; i < requests.size(); ++i) {
    const Answer answer = answers[i].get();
    EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
    EXPECT_EQ(answer.token_ids, alone.Generate(requests[i]).token_ids) << i;
    moved[i % 2] += answer.timing.migrations();
  }
  EXPECT_THAT(moved, testing::Each(testing::Gt(0u)));
}

}  // namespace
}  // namespace tandem
