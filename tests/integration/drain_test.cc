// SIGTERM and DrainWorker end no stream.
#include <signal.h>
#include <thread>

#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

ClusterSpec DrainSpec() {
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/slow");
  spec.prefill = 2;
  spec.decode = 2;
  spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                       "--kv-cache-memory-bytes=128MiB"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  return spec;
}

// Starts `count` streams and returns once each has its first message; results arrive in `answers`
// after Join().
class Streams {
 public:
  Streams(TestCluster& cluster, int count, int max_tokens)
      : answers(count), client_(cluster.channel()) {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([this, i, max_tokens] {
        answers[i] = client_.Generate(TokenRequest(RandomTokens(64, 512, 100 + i), max_tokens));
      });
    }
    EXPECT_TRUE(cluster.WaitForStreams(static_cast<size_t>(count), 30));
  }
  ~Streams() { Join(); }
  void Join() {
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }
  std::vector<Answer> answers;

 private:
  TestClient client_;
  std::vector<std::thread> threads_;
};

TEST(Drain, WorkersStoppedByTermFinishTheirStreams) {
  auto cluster = TestCluster::Start(DrainSpec());
  ASSERT_NE(cluster, nullptr);
  Streams streams(*cluster, 6, 150);
  cluster->worker("decode-0").process->Signal(SIGTERM);
  cluster->worker("prefill-0").process->Signal(SIGTERM);
  EXPECT_EQ(cluster->worker("decode-0").process->Wait(60), 0) << cluster->Logs();
  EXPECT_EQ(cluster->worker("prefill-0").process->Wait(60), 0) << cluster->Logs();
  streams.Join();
  for (const Answer& answer : streams.answers) {
    EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
    EXPECT_EQ(answer.token_ids.size(), 150u);
  }
  const Answer after =
      TestClient(cluster->channel()).Generate(TokenRequest(RandomTokens(64, 512, 9), 4));
  EXPECT_TRUE(after.status.ok()) << after.status.error_message();
}

TEST(Drain, RouterStoppedByTermFinishesItsStreams) {
  auto cluster = TestCluster::Start(DrainSpec());
  ASSERT_NE(cluster, nullptr);
  Streams streams(*cluster, 4, 150);
  cluster->router().process->Signal(SIGTERM);
  EXPECT_EQ(cluster->router().process->Wait(60), 0) << cluster->Logs();
  streams.Join();
  for (const Answer& answer : streams.answers) {
    EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
    EXPECT_EQ(answer.token_ids.size(), 150u);
  }
}

TEST(Drain, DrainWorkerTakesNoNewRequests) {
  auto cluster = TestCluster::Start(DrainSpec());
  ASSERT_NE(cluster, nullptr);
  auto admin = tandem::v1::Admin::NewStub(cluster->admin_channel());
  tandem::v1::DrainWorkerRequest request;
  tandem::v1::DrainWorkerResponse response;
  {
    grpc::ClientContext context;
    request.set_worker_id("decode-7");
    EXPECT_EQ(admin->DrainWorker(&context, request, &response).error_code(),
              grpc::StatusCode::NOT_FOUND);
  }
  grpc::ClientContext context;
  request.set_worker_id("decode-1");
  ASSERT_TRUE(admin->DrainWorker(&context, request, &response).ok());
  TestClient client(cluster->channel());
  for (int i = 0; i < 4; ++i) {
    const Answer answer = client.Generate(TokenRequest(RandomTokens(64, 512, 20 + i), 4));
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
    EXPECT_EQ(answer.timing.decode_worker(), "decode-0");
  }
  EXPECT_EQ(cluster->worker("decode-1").process->Wait(60), 0) << cluster->Logs();
}

// A worker's RPC service answers members of the cluster alone; a probe has no secret.
TEST(Drain, ProbesSeeItOnAPortOfTheirOwn) {
  ClusterSpec spec = DrainSpec();
  spec.prefill = 1;
  spec.decode = 1;
  // So that the one stream, which nobody could take over, lasts until the probe has seen the drain.
  spec.decode_flags = {"--health-listen=127.0.0.1:0", "--drain-timeout=600", "--min-step-ms=100"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  Member& worker = cluster->worker("decode-0");
  const auto health = [&worker] {
    return RunCommand(
        {BinaryPath("tandem"), "health", "--timeout=60", "--server", worker.health_address}, 120);
  };
  const Completed before = health();
  EXPECT_EQ(before.exit_code, 0) << before.err;
  EXPECT_EQ(before.out, worker.health_address + " SERVING\n");

  TestClient client(cluster->channel());
  grpc::ClientContext context;
  std::thread stream([&] {
    client.Generate(TokenRequest(RandomTokens(64, 512, 1), 3000), &context, [](const Answer&) {});
  });
  EXPECT_TRUE(cluster->WaitForStreams(1, 60)) << cluster->Logs();
  worker.process->Signal(SIGTERM);
  Completed draining = health();
  while (draining.exit_code == 0) draining = health();  // the signal is on its way
  EXPECT_EQ(draining.exit_code, 1);
  EXPECT_EQ(draining.out, worker.health_address + " NOT_SERVING\n") << draining.err;
  context.TryCancel();
  stream.join();
  EXPECT_EQ(worker.process->Wait(120), 0) << cluster->Logs();
}

}  // namespace
}  // namespace tandem
