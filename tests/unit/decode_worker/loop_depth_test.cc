// With two steps in flight nothing but time changes: same tokens, same logprobs, no token that
// nobody should see, and no block that is used again while a launched step may write it.
#include <random>
#include <vector>

#include "gmock/gmock.h"

#include "tests/support/sanitizer.h"
#include "tests/unit/decode_worker/loop_harness.h"

namespace tandem::decode {
namespace {

HarnessOptions Ahead(int num_blocks = 64) {
  HarnessOptions options;
  options.num_blocks = num_blocks;
  options.max_in_flight = 2;
  options.loop.admission.limits.max_num_seqs = 8;
  options.loop.admission.limits.max_num_batched_tokens = 16;
  options.loop.admission.local_prefill_max_tokens = 6;
  options.loop.admission.unified = true;
  return options;
}

// The token that a greedy request of this prompt draws as its `index`-th.
int32_t TokenAt(const std::vector<int32_t>& prompt, int index) {
  return engine::FakeReferenceTokens(prompt, Greedy(index + 1), 1 << 20, kVocab, kLayers).back();
}

TEST(LoopDepthTest, TheNextStepIsLaunchedBeforeTheLastIsCollected) {
  LoopHarness h(Ahead());
  Client& client = h.Submit(MakePrompt(8), Greedy(4));
  h.Step();
  EXPECT_EQ(h.runner.num_runs(), 0);  // the fake computes when it is collected
  EXPECT_TRUE(client.Tokens().empty());
  h.Step();  // launches the second step, whose input nobody on the host knows
  EXPECT_EQ(h.runner.num_runs(), 1);
  EXPECT_EQ(client.Tokens().size(), 1u);
  h.StepAll();
  h.ExpectFinished(client);
  h.ExpectNoLeak();
}

TEST(LoopDepthTest, TheTokenAfterAStopIsSeenByNobody) {
  LoopHarness h(Ahead());
  engine::SamplingParams sampling = Greedy(20);
  sampling.stop_token_ids = {TokenAt(MakePrompt(8), 3)};
  Client& client = h.Submit(MakePrompt(8), sampling);
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(client.Finish(), FinishReason::kStop);
  EXPECT_EQ(client.Tokens().size(), 4u);
  // The prompt, three tokens, and the stop token that was computed before it was seen.
  EXPECT_EQ(h.runner.num_tokens(), 8 + 3 + 1);
  EXPECT_EQ(h.decode_metrics.worker.generation_tokens.Value(), 4);
  h.ExpectNoLeak();
}

TEST(LoopDepthTest, AnEndThatIsKnownBeforehandCostsNoSurplusStep) {
  LoopHarness h(Ahead());
  Client& client = h.Submit(MakePrompt(8), Greedy(4));
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(client.Finish(), FinishReason::kLength);
  EXPECT_EQ(h.runner.num_tokens(), 8 + 3);
  h.ExpectNoLeak();
}

// The blocks of a sequence that is cancelled while a step computes it go to a prompt that a fast
// sender fills at once, in the same turn, before that step is collected.
TEST(LoopDepthTest, BlocksAreNotUsedAgainBeforeTheStepThatWritesThemIsOver) {
  HarnessOptions options = Ahead();
  options.loop.admission.unified = false;
  LoopHarness h(options);
  h.caller.on_call = [&h](FakeCall& call) { h.Serve(call); };
  Client& cancelled = h.Submit(MakePrompt(6, 1), Greedy(50));
  Client& neighbour = h.Submit(MakePrompt(6, 2), Greedy(50));
  for (int i = 0; i < 4; ++i) h.Step();
  h.Cancel(cancelled);
  Client& next = h.Submit(MakePrompt(20, 3), Greedy(8), /*peers=*/1);
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 1u);
  h.StepAll();
  h.ExpectFinished(next);
  h.ExpectFinished(neighbour);
  EXPECT_TRUE(absl::IsCancelled(*cancelled.end));
  h.ExpectNoLeak();
}

TEST(LoopDepthTest, BlocksOfALaunchedStepAreInQuarantineUntilItIsOver) {
  LoopHarness h(Ahead());
  Client& client = h.Submit(MakePrompt(6), Greedy(50));
  Client& neighbour = h.Submit(MakePrompt(6, 2), Greedy(50));
  for (int i = 0; i < 3; ++i) h.Step();
  int quarantined = -1;
  h.Cancel(client);
  // Looked at while the step runs that still writes the cancelled sequence's last block.
  h.before_run = [&](const engine::Batch& batch) {
    if (batch.items.size() == 2) quarantined = h.pool.counts().quarantined;
    return absl::OkStatus();
  };
  h.Step();
  EXPECT_GE(quarantined, 1);
  EXPECT_EQ(h.pool.counts().quarantined, 0);
  h.StepAll();
  h.ExpectFinished(neighbour);
  h.ExpectNoLeak();
}

TEST(LoopDepthTest, APreemptedSequenceDrawsItsPendingTokenAgain) {
  for (bool caching : {true, false}) {
    HarnessOptions options = Ahead(12);
    options.caching = caching;
    LoopHarness h(options);
    Client& old = h.Submit(MakePrompt(8, 1), Greedy(30));
    Client& young = h.Submit(MakePrompt(9, 2), Greedy(30));
    h.StepAll();
    h.ExpectFinished(old);
    h.ExpectFinished(young);
    EXPECT_EQ(old.events.back().timing->preemptions, 0);
    EXPECT_GE(young.events.back().timing->preemptions, 1);
    h.ExpectNoLeak();
  }
}

TEST(LoopDepthTest, AFailedStepTakesTheOneThatBuildsOnItAlong) {
  LoopHarness h(Ahead());
  Client& lost = h.Submit(MakePrompt(20), Greedy(20));
  for (int i = 0; i < 4; ++i) h.Step();
  bool fail = true;
  h.before_run = [&fail](const engine::Batch&) {
    return std::exchange(fail, false) ? absl::InternalError("broken") : absl::OkStatus();
  };
  Client& fine = h.Submit(MakePrompt(12, 2), Greedy(8));  // comes in one step later
  h.StepAll();
  ASSERT_TRUE(lost.end.has_value());
  EXPECT_TRUE(absl::IsInternal(*lost.end));
  h.ExpectFinished(fine);
  Client& again = h.Submit(MakePrompt(20), Greedy(20));
  h.StepAll();
  h.ExpectFinished(again);
  h.ExpectNoLeak();
}

// ---- equality of random workloads at depth 1 and 2 ----

struct Result {
  std::vector<int32_t> prompt;
  std::vector<int32_t> tokens;
  std::vector<TokenLogprob> logprobs;  // empty, or of each token
  std::vector<TokenLogprob> prompt_logprobs;
  FinishReason finish = FinishReason::kNone;
  bool ok = false;
};

bool Same(const TokenLogprob& a, const TokenLogprob& b) {
  if (a.token != b.token || a.logprob != b.logprob || a.top.size() != b.top.size()) return false;
  for (size_t i = 0; i < a.top.size(); ++i) {
    if (a.top[i].token != b.top[i].token || a.top[i].logprob != b.top[i].logprob) return false;
  }
  return true;
}

// Requests come, end, are cancelled and preempted, on a pool that is too small for them.
class Workload {
 public:
  Workload(uint32_t seed, int max_in_flight, bool delays) : random_(seed) {
    HarnessOptions options = Ahead(26);
    options.max_in_flight = max_in_flight;
    options.loop.admission.max_model_len = 80;
    if (delays) {
      options.step_delay = [random = std::mt19937(seed + 1)]() mutable {
        return absl::Microseconds(random() % 300);
      };
    }
    harness_ = std::make_unique<LoopHarness>(std::move(options));
  }

  std::vector<Result> Run() {
    for (int i = 0; i < 40; ++i) {
      SubmitOne();
      if (Below(8) == 0) harness_->Cancel(*harness_->clients[static_cast<size_t>(Below(i + 1))]);
      for (int steps = Below(6); steps > 0; --steps) harness_->Step();
    }
    harness_->StepAll();
    harness_->ExpectNoLeak();
    std::vector<Result> results;
    for (const auto& client : harness_->clients) results.push_back(ResultOf(*client));
    return results;
  }
  double preemptions() { return harness_->decode_metrics.worker.preemptions.Value(); }

 private:
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }

  void SubmitOne() {
    engine::SamplingParams sampling = Greedy(1 + Below(30));
    if (Below(2) == 0) sampling.temperature = 1;
    sampling.seed = random_();
    for (int i = 0; i < 30; ++i) sampling.stop_token_ids.push_back(Below(kVocab));
    sampling.min_tokens = Below(3);
    sampling.logprobs = Below(3) - 1;
    sampling.prompt_logprobs = Below(6) == 0 ? 1 : -1;
    harness_->Submit(MakePrompt(1 + Below(30), 1 + Below(4)), sampling);
  }

  static Result ResultOf(const Client& client) {
    Result result;
    result.prompt = client.prompt;
    result.ok = client.end.has_value() && client.end->ok();
    result.finish = client.Finish();
    result.tokens = client.Tokens();
    for (const TokenEvent& event : client.events) {
      result.logprobs.insert(result.logprobs.end(), event.logprobs.begin(), event.logprobs.end());
      result.prompt_logprobs.insert(result.prompt_logprobs.end(), event.prompt_logprobs.begin(),
                                    event.prompt_logprobs.end());
    }
    return result;
  }

  std::mt19937 random_;
  std::unique_ptr<LoopHarness> harness_;
};

class LoopEquality : public testing::TestWithParam<bool> {};

TEST_P(LoopEquality, TwoStepsInFlightGiveWhatOneGives) {
  int compared = 0;
  double preemptions = 0;
  const auto seeds = static_cast<uint32_t>(SanitizerShare(40));
  for (uint32_t seed = 0; seed < seeds; ++seed) {
    SCOPED_TRACE(seed);
    Workload one_workload(seed, 1, false);
    Workload two_workload(seed, 2, /*delays=*/GetParam());
    const std::vector<Result> one = one_workload.Run();
    const std::vector<Result> two = two_workload.Run();
    ASSERT_EQ(one.size(), two.size());
    for (size_t i = 0; i < one.size(); ++i) {
      SCOPED_TRACE(i);
      ASSERT_EQ(one[i].prompt, two[i].prompt);
      // A cancelled or refused request got as far as it got.
      const size_t common = std::min(one[i].tokens.size(), two[i].tokens.size());
      for (size_t t = 0; t < common; ++t) {
        ASSERT_EQ(one[i].tokens[t], two[i].tokens[t]);
        if (one[i].logprobs.empty()) continue;
        ASSERT_TRUE(Same(one[i].logprobs[t], two[i].logprobs[t]));
      }
      if (!one[i].ok || !two[i].ok) continue;
      ASSERT_EQ(one[i].tokens.size(), two[i].tokens.size());
      ASSERT_EQ(one[i].finish, two[i].finish);
      ASSERT_EQ(one[i].prompt_logprobs.size(), two[i].prompt_logprobs.size());
      for (size_t t = 0; t < one[i].prompt_logprobs.size(); ++t) {
        ASSERT_TRUE(Same(one[i].prompt_logprobs[t], two[i].prompt_logprobs[t]));
      }
      ++compared;
    }
    preemptions += two_workload.preemptions();
  }
  EXPECT_GT(compared, SanitizerShare(500));
  EXPECT_GT(preemptions, SanitizerShare(20));
}

INSTANTIATE_TEST_SUITE_P(All, LoopEquality, testing::Bool(), [](const auto& info) {
  return std::string(info.param ? "WithDelays" : "AtOnce");
});

}  // namespace
}  // namespace tandem::decode
