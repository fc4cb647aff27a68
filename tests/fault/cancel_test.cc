// Clients that go away, in every stage of a request: nothing is held afterwards.
#include <chrono>
#include <random>
#include <thread>

#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

TEST(Cancel, ClientsThatLeaveAtAnyTimeLeakNothing) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/slow");
  spec.prefill = 2;
  spec.decode = 2;
  spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                       "--kv-cache-memory-bytes=128MiB", "--max-num-batched-tokens=128"};
  spec.decode_flags = {"--local-prefill-max-tokens=16"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  TestClient client(cluster->channel());
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int i = 0; i < 6; ++i) {
        const int length = 1 + static_cast<int>(random() % 1200);
        const auto request = TokenRequest(RandomTokens(length, 512, random()), 400);
        // From "before it is routed" to "well into decoding".
        const double seconds = 0.002 * static_cast<double>(1 << (random() % 10));
        if (random() % 2 == 0) {
          const Answer answer = client.Generate(request, seconds);
          // Or refused at once, for its turn would come behind its deadline.
          EXPECT_TRUE(answer.status.ok() ||
                      answer.status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED ||
                      answer.status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED)
              << answer.status.error_message();
        } else {
          grpc::ClientContext context;
          std::thread canceller([&] {
            SleepMilliseconds(static_cast<int>(seconds * 1000));
            context.TryCancel();
          });
          auto reader = client.stub().Generate(&context, request);
          tandem::v1::GenerateResponse message;
          while (reader->Read(&message)) {
          }
          const grpc::Status status = reader->Finish();
          EXPECT_TRUE(status.ok() || status.error_code() == grpc::StatusCode::CANCELLED)
              << status.error_message();
          canceller.join();
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_TRUE(cluster->WaitFor(
      [](const auto& state) {
        for (const auto& worker : state.workers()) {
          if (worker.blocks_used() + worker.blocks_quarantined() + worker.running() +
                  worker.waiting() >
              0)
            return false;
        }
        return state.running_requests() == 0 && state.queued_requests() == 0 &&
               state.workers_size() == 4;
      },
      30))
      << cluster->GetCluster().DebugString() << cluster->Logs();
  EXPECT_TRUE(client.Generate(TokenRequest(RandomTokens(100, 512, 5), 4)).status.ok());
}

}  // namespace
}  // namespace tandem
