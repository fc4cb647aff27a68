// Random prompts with shared beginnings, cancellations and lost peers on small pools: every request
// is answered once, every answer and every shipped block is right, and nothing is leaked.
#include <random>

#include "gtest/gtest.h"

#include "tests/unit/prefill_worker/loop_harness.h"

namespace tandem::prefill {
namespace {

class PrefillStress : public testing::TestWithParam<uint64_t> {
 protected:
  PrefillStress() : random_(GetParam()) {}

  int Pick(int n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }

  // Pieces of 20 tokens, each one of three: prompts share beginnings of odd lengths.
  std::vector<int32_t> RandomPrompt() {
    std::vector<int32_t> tokens;
    for (int pieces = 1 + Pick(6); pieces > 0; --pieces) {
      const int32_t kind = Pick(3);
      for (int i = 0; i < 20; ++i) tokens.push_back(kind * 100 + i);
    }
    tokens.resize(tokens.size() - static_cast<size_t>(Pick(20)));
    return tokens;
  }

  std::mt19937_64 random_;
};

TEST_P(PrefillStress, EveryAnswerIsRightAndNothingLeaks) {
  LoopHarness h({.num_blocks = 10 + Pick(20),
                 .block_size = 16 << Pick(2),
                 .max_num_batched_tokens = 8 + Pick(100),
                 .max_num_seqs = 1 + Pick(6),
                 .caching = Pick(4) != 0,
                 .max_in_flight = 1 + Pick(2)});
  h.sender.complete_at_once = false;
  std::map<uint64_t, Work> works;
  const auto complete_some = [&](int one_in) {
    for (const auto& [id, epoch] : h.sender.open()) {
      if (Pick(one_in) != 0) continue;
      const bool replied = h.replies.contains(id.value.low);
      const bool fails = Pick(6) == 0;
      if (!replied && !fails) continue;  // a transfer that is not finished can only fail
      h.sender.Complete(id, epoch, fails ? absl::UnavailableError("lost") : absl::OkStatus());
    }
  };
  for (int turn = 0; turn < 400; ++turn) {
    if (Pick(3) == 0) {
      Work work = h.MakeWork(RandomPrompt());
      work.priority = Pick(2);
      work.sampling.temperature = static_cast<float>(Pick(2));
      work.sampling.seed = random_();
      works.emplace(work.id, work);
      h.Submit(std::move(work));
    }
    if (Pick(12) == 0) h.inbox.Push(WorkCancelled{static_cast<uint64_t>(Pick(150))});
    if (Pick(50) == 0) {
      h.before_run = [](const engine::Batch&) { return absl::InternalError("injected"); };
    } else {
      h.before_run = nullptr;
    }
    h.Step();
    complete_some(4);
  }
  h.before_run = nullptr;
  for (int i = 0; i < 2000 && (h.loop->Load().running > 0 || h.loop->Load().waiting > 0); ++i) {
    h.Step();
    complete_some(1);
  }
  int right = 0;
  for (const auto& [id, work] : works) {
    ASSERT_TRUE(h.replies.contains(id)) << "request " << id << " was never answered";
    if (!h.replies.at(id).ok()) continue;
    ++right;
    ASSERT_EQ(h.replies.at(id)->first_token.token, h.Expected(work)[0]);
  }
  EXPECT_GT(right, 20);
  h.ExpectNothingHeld();
}

INSTANTIATE_TEST_SUITE_P(Seeds, PrefillStress, testing::Range<uint64_t>(1, 31));

}  // namespace
}  // namespace tandem::prefill
