// Two prefill and two decode workers in one process, stepped by hand: every message that would
// cross a wire is made and read, but no wire is there.
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

#include "engine/wire/wire.h"
#include "simulation/fake_clock.h"
#include "simulation/workers.h"

namespace tandem {
namespace {

constexpr int kVocab = 1000;
constexpr int kMaxModelLen = 200;

struct Answer {
  internal::v1::DecodeRequest request;
  InProcessDecodeWorker* worker = nullptr;
  uint64_t id = 0;
  std::vector<int32_t> tokens;
  bool ended = false;
  absl::Status status;
};

class InProcessWorkers : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    for (int i = 0; i < 2; ++i) {
      prefill_.push_back(std::make_unique<InProcessPrefillWorker>(
          Options("p" + std::to_string(i), 120), &kv_, &clock_, JoinMessages{}));
      prefill_pointers_.push_back(prefill_.back().get());
    }
    for (int i = 0; i < 2; ++i) {
      decode_.push_back(std::make_unique<InProcessDecodeWorker>(
          Options("d" + std::to_string(i), 60), &kv_, &prefill_pointers_, &clock_, JoinMessages{}));
    }
  }

  InProcessWorkerOptions Options(const std::string& worker_id, int num_blocks) {
    InProcessWorkerOptions options;
    options.worker_id = worker_id;
    options.engine.num_blocks = num_blocks;
    options.engine.block_size = 8;
    options.engine.model.max_in_flight = GetParam();
    options.max_model_len = kMaxModelLen;
    return options;
  }

  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }

  void Submit() {
    auto answer = std::make_unique<Answer>();
    Answer* a = answer.get();
    std::vector<int32_t> prompt;
    const int beginning = Below(4);
    for (int i = 1 + Below(100); i > 0; --i) prompt.push_back((beginning * 37 + i) % kVocab);
    engine::TokensToProto(prompt, a->request.mutable_token_ids());
    a->request.set_request_id("r" + std::to_string(answers_.size()));
    a->request.mutable_sampling()->set_temperature(static_cast<float>(Below(2)));
    a->request.mutable_sampling()->set_seed(random_());
    a->request.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(1 + Below(40)));
    for (int i = 0; i < 2; ++i) {
      auto* candidate = a->request.mutable_route()->add_prefill();
      const InProcessPrefillWorker& prefill = *prefill_[static_cast<size_t>((i + Below(2)) % 2)];
      candidate->set_worker_id(prefill.address());
      candidate->set_address(prefill.address());
    }
    a->worker = decode_[static_cast<size_t>(Below(2))].get();
    answers_.push_back(std::move(answer));
    a->id = a->worker->Generate(
        a->request, absl::InfiniteDuration(),
        [a](internal::v1::TokenEvent event) {
          for (uint32_t id : event.token_ids()) a->tokens.push_back(static_cast<int32_t>(id));
        },
        [a](absl::Status status) {
          EXPECT_FALSE(a->ended) << "a stream ended twice";
          a->ended = true;
          a->status = std::move(status);
        });
  }

  bool StepAll() {
    bool busy = false;
    clock_.Advance(absl::Milliseconds(1));
    for (auto& worker : decode_) busy |= worker->Step();
    for (auto& worker : prefill_) busy |= worker->Step();
    return busy;
  }

  static std::vector<int32_t> Reference(const internal::v1::DecodeRequest& request) {
    const std::vector<int32_t> prompt(request.token_ids().begin(), request.token_ids().end());
    return engine::FakeReferenceTokens(
        prompt, *engine::SamplingFromProto(request.sampling(), {}, kVocab), kMaxModelLen, kVocab);
  }

  std::mt19937 random_{7};
  FakeClock clock_;
  InProcessKvNetwork kv_;
  std::vector<std::unique_ptr<InProcessPrefillWorker>> prefill_;
  std::vector<InProcessPrefillWorker*> prefill_pointers_;
  std::vector<std::unique_ptr<InProcessDecodeWorker>> decode_;
  std::vector<std::unique_ptr<Answer>> answers_;
};

TEST_P(InProcessWorkers, EveryRequestGetsItsTokensAndNothingLeaks) {
  for (int i = 0; i < 600; ++i) {
    Submit();
    if (Below(10) == 0) {
      const Answer& answer = *answers_[static_cast<size_t>(Below(i + 1))];
      answer.worker->Cancel(answer.id);
    }
    for (int steps = Below(8); steps > 0; --steps) StepAll();
  }
  for (int idle = 0; idle < 5;) idle = StepAll() ? 0 : idle + 1;
  int finished = 0;
  for (const auto& answer : answers_) {
    ASSERT_TRUE(answer->ended) << answer->request.request_id();
    const std::vector<int32_t> expected = Reference(answer->request);
    ASSERT_LE(answer->tokens.size(), expected.size());
    ASSERT_TRUE(std::equal(answer->tokens.begin(), answer->tokens.end(), expected.begin()));
    if (!answer->status.ok()) continue;
    ASSERT_EQ(answer->tokens, expected);
    ++finished;
  }
  EXPECT_GT(finished, 300);
  for (const auto& worker : decode_) {
    EXPECT_EQ(worker->num_sequences(), 0u);
    EXPECT_EQ(worker->num_transfers(), 0u);
    EXPECT_EQ(worker->engine().pool.counts().used, 0);
    EXPECT_EQ(worker->engine().pool.counts().quarantined, 0);
  }
  for (const auto& worker : prefill_) EXPECT_EQ(worker->engine().pool.counts().used, 0);
}

INSTANTIATE_TEST_SUITE_P(StepsInFlight, InProcessWorkers, testing::Values(1, 2));

}  // namespace
}  // namespace tandem
