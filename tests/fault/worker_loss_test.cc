// kill -9 of workers: no request is lost that could be saved, no block leaks, no stream hangs.
#include <chrono>
#include <future>
#include <signal.h>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

ClusterSpec Spec() {
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/slow");
  spec.prefill = 2;
  spec.decode = 2;
  // Many small steps, so that a prefill is caught in its middle.
  spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                       "--kv-cache-memory-bytes=256MiB", "--max-num-batched-tokens=128"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  return spec;
}

bool NothingHeld(const tandem::v1::GetClusterResponse& state) {
  for (const auto& worker : state.workers()) {
    if (worker.blocks_used() + worker.blocks_quarantined() + worker.running() + worker.waiting() >
        0)
      return false;
  }
  return true;
}

TEST(WorkerLoss, PrefillKilledDuringPrefillIsReplaced) {
  auto cluster = TestCluster::Start(Spec());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto request = TokenRequest(RandomTokens(4000, 512, 1), 8);
  auto pending = std::async(std::launch::async, [&] { return client.Generate(request); });
  std::string busy;
  ASSERT_TRUE(cluster->WaitFor(
      [&](const auto& state) {
        for (const auto& worker : state.workers()) {
          // Some chunks are done, most are not.
          if (worker.role() == "prefill" && worker.waiting_tokens() > 0 &&
              worker.waiting_tokens() < 3800) {
            busy = worker.worker_id();
          }
        }
        return !busy.empty();
      },
      30));
  cluster->worker(busy).process->Signal(SIGKILL);
  const Answer answer = pending.get();
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster->Logs();
  EXPECT_EQ(answer.token_ids.size(), 8u);
  EXPECT_NE(answer.timing.prefill_worker(), busy);
  EXPECT_TRUE(cluster->WaitFor(NothingHeld, 15))
      << cluster->GetCluster().DebugString() << cluster->Logs();
  const Answer again = client.Generate(request);
  ASSERT_TRUE(again.status.ok()) << again.status.error_message();
  EXPECT_EQ(again.token_ids, answer.token_ids);
  EXPECT_EQ(again.logprobs, answer.logprobs);
}

TEST(WorkerLoss, DecodeKilledEndsItsStreamsAtOnceAndFreesWhatWasHeldForIt) {
  using Clock = std::chrono::steady_clock;
  auto cluster = TestCluster::Start(Spec());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  constexpr int kStreams = 8;
  std::vector<Answer> answers(kStreams);
  std::vector<Clock::time_point> ended(kStreams);
  std::vector<std::thread> threads;
  for (int i = 0; i < kStreams; ++i) {
    threads.emplace_back([&, i] {
      answers[i] = client.Generate(TokenRequest(RandomTokens(40, 512, i), 4000));
      ended[i] = Clock::now();
    });
  }
  const bool spread = cluster->WaitFor(
      [](const auto& state) {
        int running = 0, busy = 0;
        for (const auto& worker : state.workers()) {
          if (worker.role() != "decode") continue;
          running += worker.running();
          busy += worker.running() > 0;
        }
        return running == kStreams && busy == 2;
      },
      30);
  EXPECT_TRUE(spread) << "streams did not spread over both decode workers:\n"
                      << cluster->GetCluster().DebugString();
  const Clock::time_point killed = Clock::now();
  cluster->worker("decode-0").process->Signal(SIGKILL);
  ASSERT_TRUE(cluster->WaitForWorkers(3, 10)) << cluster->GetCluster().DebugString();
  const Answer fresh = client.Generate(TokenRequest(RandomTokens(100, 512, 77), 4));
  EXPECT_TRUE(fresh.status.ok()) << fresh.status.error_message();
  EXPECT_EQ(fresh.timing.decode_worker(), "decode-1");
  // The survivors' streams are cut by ending their worker too, once the lost ones are known to have
  // ended.
  int lost_first = 0;
  SleepMilliseconds(500);
  cluster->worker("decode-1").process->Signal(SIGKILL);
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < kStreams; ++i) {
    EXPECT_EQ(answers[i].status.error_code(), grpc::StatusCode::UNAVAILABLE)
        << answers[i].status.error_message();
    EXPECT_THAT(answers[i].status.error_message(), testing::HasSubstr("decode-"));
    EXPECT_FALSE(answers[i].token_ids.empty());
    if (answers[i].status.error_message().find("decode-0") == std::string::npos) continue;
    EXPECT_LT(ended[i] - killed, std::chrono::seconds(2)) << "stream " << i;
    ++lost_first;
  }
  EXPECT_GE(lost_first, 1);
  EXPECT_TRUE(cluster->WaitFor(
      [](const auto& state) { return state.workers_size() == 2 && NothingHeld(state); }, 15))
      << cluster->GetCluster().DebugString() << cluster->Logs();
  cluster->StartWorker("decode-1");
  ASSERT_TRUE(cluster->WaitForWorkers(3, 30));
  EXPECT_TRUE(client.Generate(TokenRequest(RandomTokens(100, 512, 78), 4)).status.ok());
}

TEST(WorkerLoss, DecodeKilledDuringPrefillIsReplacedBeforeTheFirstToken) {
  auto cluster = TestCluster::Start(Spec());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto request = TokenRequest(RandomTokens(4000, 512, 2), 8);
  auto pending = std::async(std::launch::async, [&] { return client.Generate(request); });
  std::string waiting;
  ASSERT_TRUE(cluster->WaitFor(
      [&](const auto& state) {
        bool prefilling = false;
        for (const auto& worker : state.workers()) {
          if (worker.role() == "decode" && worker.blocks_used() > 0) waiting = worker.worker_id();
          prefilling |= worker.role() == "prefill" && worker.waiting_tokens() > 0 &&
                        worker.waiting_tokens() < 3800;
        }
        return prefilling && !waiting.empty();
      },
      30));
  cluster->worker(waiting).process->Signal(SIGKILL);
  const Answer answer = pending.get();
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster->Logs();
  EXPECT_NE(answer.timing.decode_worker(), waiting);
  EXPECT_TRUE(cluster->WaitFor(
      [](const auto& state) { return state.workers_size() == 3 && NothingHeld(state); }, 15))
      << cluster->GetCluster().DebugString() << cluster->Logs();
}

TEST(WorkerLoss, RouterKilledAndRestartedIsJoinedAgain) {
  ClusterSpec spec = Spec();
  spec.model_dir = SourcePath("tests/data/models/small");
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  const std::vector<std::string> restart = {BinaryPath("tandem_router"),
                                            "--model",
                                            spec.model_dir,
                                            "--listen",
                                            cluster->address(),
                                            "--internal-listen",
                                            cluster->router().internal_address};
  cluster->router().process->Signal(SIGKILL);
  ASSERT_TRUE(cluster->router().process->Wait(10).has_value());
  auto router =
      Process::Spawn(restart, {std::string("TANDEM_CLUSTER_SECRET=") + kClusterSecret}, "");
  ASSERT_TRUE(router->ReadLine(30).has_value());
  ASSERT_TRUE(cluster->WaitForWorkers(4, 30)) << cluster->Logs();
  EXPECT_TRUE(TestClient(cluster->channel())
                  .Generate(TokenRequest(RandomTokens(100, 512, 5), 4))
                  .status.ok());
}

}  // namespace
}  // namespace tandem
