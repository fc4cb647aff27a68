// kill -9 of workers: no request is lost that could be saved, no block leaks, no stream hangs.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <future>
#include <signal.h>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

// Shorter under a sanitizer, where the steps are long enough for a kill in their midst.
int LongPrompt() { return SanitizerSlowsBy() > 1 ? 1600 : 4000; }
int LongAnswer() { return SanitizerSlowsBy() > 1 ? 80 : 200; }

ClusterSpec LossSpec() {
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
  auto cluster = TestCluster::Start(LossSpec());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto request = TokenRequest(RandomTokens(LongPrompt(), 512, 1), 8);
  auto pending = std::async(std::launch::async, [&] { return client.Generate(request); });
  std::string busy;
  ASSERT_TRUE(cluster->WaitFor(
      [&](const auto& state) {
        for (const auto& worker : state.workers()) {
          // Some chunks are done, most are not.
          if (worker.role() == "prefill" && worker.waiting_tokens() > 0 &&
              worker.waiting_tokens() + 200 < static_cast<uint64_t>(LongPrompt())) {
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

// Every kind of request that continues differently if anything of it is forgotten.
v1::GenerateRequest StreamRequest(int i) {
  v1::GenerateRequest request = TokenRequest(RandomTokens(40, 512, i), LongAnswer());
  v1::SamplingParams& sampling = *request.mutable_sampling();
  if (i % 4 != 0) {
    sampling.set_temperature(0.8f);
    sampling.set_seed(static_cast<uint64_t>(i));
  }
  if (i % 4 >= 2) {
    sampling.set_presence_penalty(0.5f);
    sampling.set_frequency_penalty(0.3f);
    sampling.set_repetition_penalty(1.2f);
  }
  if (i % 4 == 3) sampling.set_logprobs(2);
  return request;
}

// All at once; `meanwhile` runs beside them.
std::vector<Answer> AskAll(
    TestCluster& cluster, const std::vector<v1::GenerateRequest>& requests,
    const std::function<void()>& meanwhile = [] {}) {
  TestClient client(cluster.channel());
  std::vector<Answer> answers(requests.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < requests.size(); ++i) {
    threads.emplace_back([&, i] { answers[i] = client.Generate(requests[i], 240); });
  }
  meanwhile();
  for (auto& thread : threads) thread.join();
  return answers;
}

// Asks twice, and kills decode-0 the second time, when all streams run.
void KillUnder(TestCluster& cluster, const std::vector<v1::GenerateRequest>& requests) {
  const std::vector<Answer> undisturbed = AskAll(cluster, requests);
  ASSERT_TRUE(cluster.WaitForStreams(0, 30)) << cluster.GetCluster().DebugString();
  const std::vector<Answer> answers = AskAll(cluster, requests, [&] {
    EXPECT_TRUE(cluster.WaitForStreams(requests.size(), 60)) << cluster.GetCluster().DebugString();
    cluster.worker("decode-0").process->Signal(SIGKILL);
  });
  size_t moved = 0;
  double longest_ms = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    ASSERT_TRUE(undisturbed[i].status.ok()) << undisturbed[i].status.error_message();
    EXPECT_TRUE(answers[i].status.ok()) << answers[i].status.error_message();
    EXPECT_EQ(answers[i].token_ids, undisturbed[i].token_ids) << "stream " << i;
    EXPECT_EQ(answers[i].logprobs, undisturbed[i].logprobs) << "stream " << i;
    EXPECT_EQ(answers[i].text, undisturbed[i].text) << "stream " << i;
    EXPECT_EQ(answers[i].finish_reason, undisturbed[i].finish_reason) << "stream " << i;
    moved += answers[i].timing.migrations();
    longest_ms = std::max(longest_ms, answers[i].longest_gap_ms);
  }
  std::printf("%zu of %zu streams went on elsewhere; the longest gap was %.0f ms\n", moved,
              requests.size(), longest_ms);
  EXPECT_GE(moved, requests.size() / 4);
}

// A stop string that ends an answer of this text late, behind where the worker is lost; empty if it
// would end it earlier.
std::string LateStop(const std::string& text) {
  const size_t late = text.size() * 9 / 10;
  const std::string stop = text.substr(late, 8);
  return text.find(stop) == late ? stop : "";
}

TEST(WorkerLoss, StopStringsAndTextGoOnElsewhere) {
  ClusterSpec spec = LossSpec();
  spec.model_dir = SourcePath("models/demo");
  // Streams last longer than reports take.
  spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=128MiB",
                       "--min-step-ms=10"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  std::vector<v1::GenerateRequest> requests;
  for (int i = 0; i < 16; ++i) {
    requests.push_back(StreamRequest(i));
    requests.back().mutable_sampling()->set_max_tokens(3 * LongAnswer());
  }
  const std::vector<Answer> whole = AskAll(*cluster, requests);
  int stops = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::string stop = LateStop(whole[i].text);
    if (i % 4 == 0 || stop.empty()) continue;
    requests[i].mutable_sampling()->add_stop(stop);
    ++stops;
  }
  EXPECT_GE(stops, 4);
  KillUnder(*cluster, requests);
}

TEST(WorkerLoss, DecodeKilledUnderStreamsLosesNoToken) {
  auto cluster = TestCluster::Start(LossSpec());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  std::vector<v1::GenerateRequest> requests;
  const int streams = SanitizerSlowsBy() > 1 ? 12 : 32;
  for (int i = 0; i < streams; ++i) requests.push_back(StreamRequest(i));
  KillUnder(*cluster, requests);
  EXPECT_TRUE(cluster->WaitFor(
      [](const auto& state) { return state.workers_size() == 3 && NothingHeld(state); }, 15))
      << cluster->GetCluster().DebugString() << cluster->Logs();
  cluster->StartWorker("decode-0");
  ASSERT_TRUE(cluster->WaitForWorkers(4, 30));
  EXPECT_TRUE(client.Generate(TokenRequest(RandomTokens(100, 512, 78), 4)).status.ok());
}

TEST(WorkerLoss, DecodeKilledDuringPrefillIsReplacedBeforeTheFirstToken) {
  auto cluster = TestCluster::Start(LossSpec());
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  const auto request = TokenRequest(RandomTokens(LongPrompt(), 512, 2), 8);
  auto pending = std::async(std::launch::async, [&] { return client.Generate(request); });
  std::string waiting;
  ASSERT_TRUE(cluster->WaitFor(
      [&](const auto& state) {
        bool prefilling = false;
        for (const auto& worker : state.workers()) {
          if (worker.role() == "decode" && worker.blocks_used() > 0) waiting = worker.worker_id();
          prefilling |= worker.role() == "prefill" && worker.waiting_tokens() > 0 &&
                        worker.waiting_tokens() + 200 < static_cast<uint64_t>(LongPrompt());
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
  ClusterSpec spec = LossSpec();
  spec.model_dir = SourcePath("tests/data/models/small");
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  const std::vector<std::string> restart = {BinaryPath("tandem_router"),
                                            "--model",
                                            spec.model_dir,
                                            "--load-format=dummy",
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
