// kill -9 while blocks come back from a decode worker to a prefill worker, of either: the request
// is served all the same, with the right tokens, and nobody keeps a block.
#include <chrono>
#include <future>
#include <memory>
#include <optional>
#include <ostream>
#include <signal.h>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/frozen_thread.h"
#include "tests/support/paths.h"
#include "tests/support/process_usage.h"

namespace tandem {
namespace {

struct KilledInReturn {
  std::string transport;
  std::string killed;
};

void PrintTo(const KilledInReturn& c, std::ostream* out) {
  *out << c.killed << " over " << c.transport;
}

class ReturnLoss : public testing::TestWithParam<KilledInReturn> {
 protected:
  static constexpr double kPatience = 60;

  void SetUp() override {
    ClusterSpec spec;
    spec.model_dir = SourcePath("tests/data/models/small");
    spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                         "--kv-cache-memory-bytes=64MiB", "--kv-transport=" + GetParam().transport};
    // Computing is so dear that blocks come back over whatever link, and are waited for.
    spec.prefill_flags = {"--min-step-ms=200", "--max-num-batched-tokens=64",
                          "--kv-return-timeout=120"};
    spec.decode_flags = {"--local-prefill-max-tokens=0"};
    cluster_ = TestCluster::Start(spec);
    ASSERT_NE(cluster_, nullptr);
  }

  Answer Ask(const v1::GenerateRequest& request) {
    return TestClient(cluster_->channel()).Generate(request, 2 * kPatience);
  }
  // The conversation's next turn, of 200 tokens, once the router knows what the last one left.
  v1::GenerateRequest NextTurn() {
    EXPECT_TRUE(cluster_->WaitFor(
        [&](const auto& state) {
          for (const auto& worker : state.workers()) {
            if (worker.role() == "decode" && 16 * (worker.blocks_cached() + 1) < tokens_.size()) {
              return false;
            }
          }
          return NothingHeld(state);
        },
        kPatience))
        << cluster_->GetCluster().DebugString();
    const std::vector<uint32_t> more = RandomTokens(60, 512, ++turn_);
    tokens_.insert(tokens_.end(), more.begin(), more.end());
    return TokenRequest(tokens_, 200);
  }
  void Append(const Answer& answer) {
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster_->Logs();
    tokens_.insert(tokens_.end(), answer.token_ids.begin(), answer.token_ids.end());
  }
  static bool NothingHeld(const v1::GetClusterResponse& state) {
    for (const auto& worker : state.workers()) {
      if (worker.blocks_used() + worker.blocks_quarantined() + worker.running() + worker.waiting() >
          0) {
        return false;
      }
    }
    return true;
  }

  std::unique_ptr<TestCluster> cluster_;
  std::vector<uint32_t> tokens_;  // of the conversation
  uint64_t turn_ = 0;
};

TEST_P(ReturnLoss, IsServedElsewhereAndKeepsNoBlock) {
  Append(Ask(NextTurn()));
  // The second turn makes the connection that the third one uses.
  const Answer second = Ask(NextTurn());
  Append(second);
  ASSERT_GT(second.timing.returned_tokens(), 0u);
  v1::GenerateRequest request = NextTurn();

  // Its messages: the transfer is opened, and blocks follow. What would end it is not sent.
  const auto thread = ThreadNamed(cluster_->worker("decode-0").process->pid(), "tandem-kv-send");
  ASSERT_TRUE(thread.has_value());
  std::optional<FrozenThread> giver(std::in_place, *thread, 2);
  auto pending = std::async(std::launch::async, [&] { return Ask(request); });
  ASSERT_TRUE(giver->AwaitFrozen(kPatience)) << cluster_->Logs();
  for (const char* another : {"prefill-1", "decode-1"}) cluster_->StartWorker(another);
  ASSERT_TRUE(cluster_->WaitForWorkers(4, kPatience)) << cluster_->Logs();
  ASSERT_EQ(pending.wait_for(std::chrono::seconds(0)), std::future_status::timeout);

  cluster_->worker(GetParam().killed).process->Signal(SIGKILL);
  giver.reset();
  const Answer answer = pending.get();
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster_->Logs();
  const bool of_giver = GetParam().killed == "decode-0";
  EXPECT_EQ(answer.timing.decode_worker(), of_giver ? "decode-1" : "decode-0");
  EXPECT_EQ(answer.timing.prefill_worker(), of_giver ? "prefill-0" : "prefill-1");
  EXPECT_TRUE(cluster_->WaitFor(
      [](const auto& state) { return state.workers_size() == 3 && NothingHeld(state); }, kPatience))
      << cluster_->GetCluster().DebugString() << cluster_->Logs();

  request.mutable_options()->set_cache_salt("computed again");
  const Answer again = Ask(request);
  ASSERT_TRUE(again.status.ok()) << again.status.error_message();
  EXPECT_EQ(again.usage.cached_tokens(), 0u);
  EXPECT_EQ(answer.token_ids, again.token_ids);
  EXPECT_EQ(answer.logprobs, again.logprobs);
}

INSTANTIATE_TEST_SUITE_P(Cases, ReturnLoss,
                         testing::Values(KilledInReturn{"shm", "decode-0"},
                                         KilledInReturn{"shm", "prefill-0"},
                                         KilledInReturn{"tcp", "decode-0"},
                                         KilledInReturn{"tcp", "prefill-0"}));

}  // namespace
}  // namespace tandem
