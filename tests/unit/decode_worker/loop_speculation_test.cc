// With drafts nothing but time changes: the same tokens and logprobs, and nothing of a draft that
// was wrong is ever found again; with one step in flight, and with two. loop_random_test.cc has the
// storms.
#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "tests/unit/decode_worker/loop_harness.h"
#include "tests/unit/decode_worker/oracle_drafter.h"

namespace tandem::decode {
namespace {

// A unified worker whose drafts continue as greedy requests of `prompts` do.
HarnessOptions Speculating(int max_in_flight, std::vector<std::vector<int32_t>> prompts,
                           int wrong_percent = 0) {
  HarnessOptions options;
  options.max_in_flight = max_in_flight;
  options.loop.admission.limits.max_num_seqs = 8;
  options.loop.admission.limits.max_num_batched_tokens = 64;
  options.loop.admission.unified = true;
  options.loop.speculation.longest_draft = 4;
  options.loop.speculation.drafter = [prompts = std::move(prompts), wrong_percent,
                                      seed = 0u]() mutable {
    const auto whole = [prompts](std::span<const int32_t> tokens) {
      for (const std::vector<int32_t>& prompt : prompts) {
        if (tokens.size() < prompt.size() ||
            !std::equal(prompt.begin(), prompt.end(), tokens.begin())) {
          continue;
        }
        std::vector<int32_t> text = prompt;
        const std::vector<int32_t> answer =
            engine::FakeReferenceTokens(prompt, Greedy(200), 1 << 20, kVocab, kLayers);
        text.insert(text.end(), answer.begin(), answer.end());
        return text;
      }
      return std::vector<int32_t>();
    };
    return std::make_unique<OracleDrafter>(whole, wrong_percent, ++seed);
  };
  return options;
}

int Sum(const Client& client, int DraftCounts::*count) {
  int sum = 0;
  for (const TokenEvent& event : client.events) sum += event.drafts.*count;
  return sum;
}

// By the steps that may be in flight.
class LoopSpeculationTest : public testing::TestWithParam<int> {};

TEST_P(LoopSpeculationTest, RightDraftsSaveSteps) {
  LoopHarness h(Speculating(GetParam(), {MakePrompt(8)}));
  Client& client = h.Submit(MakePrompt(8), Greedy(21));
  h.StepAll();
  h.ExpectFinished(client);
  // The prompt's step draws one token, four more draw five each.
  EXPECT_EQ(h.runner.num_runs(), 1 + 4);
  EXPECT_EQ(Sum(client, &DraftCounts::drafted), 16);
  EXPECT_EQ(Sum(client, &DraftCounts::accepted), 16);
  EXPECT_EQ(h.decode_metrics.drafted_tokens.Value(), 16);
  EXPECT_EQ(h.decode_metrics.accepted_tokens.Value(), 16);
  EXPECT_EQ(h.decode_metrics.worker.generation_tokens.Value(), 21);
  h.ExpectNoLeak();
}

TEST_P(LoopSpeculationTest, WrongDraftsChangeNothing) {
  LoopHarness h(Speculating(GetParam(), {MakePrompt(8)}, 100));
  engine::SamplingParams sampling = Greedy(40);
  sampling.logprobs = 2;
  Client& client = h.Submit(MakePrompt(8), sampling);
  h.StepAll();
  h.ExpectFinished(client);
  const int drafted = Sum(client, &DraftCounts::drafted);
  EXPECT_LT(Sum(client, &DraftCounts::accepted), drafted);
  EXPECT_GT(drafted, 20);
  size_t logprobs = 0;
  for (const TokenEvent& event : client.events) {
    for (size_t i = 0; i < event.logprobs.size(); ++i) {
      EXPECT_EQ(event.logprobs[i].token, event.token_ids[i]);
    }
    logprobs += event.logprobs.size();
  }
  EXPECT_EQ(logprobs, 40u);
  h.ExpectNoLeak();
}

TEST_P(LoopSpeculationTest, AStopTokenEndsTheAnswerInTheMiddleOfADraft) {
  for (const int at : {2, 3, 4, 5, 6, 7}) {
    LoopHarness h(Speculating(GetParam(), {MakePrompt(8)}));
    engine::SamplingParams sampling = Greedy(30);
    sampling.stop_token_ids = {
        engine::FakeReferenceTokens(MakePrompt(8), Greedy(at), 1 << 20, kVocab, kLayers).back()};
    Client& client = h.Submit(MakePrompt(8), sampling);
    h.StepAll();
    h.ExpectFinished(client);
    EXPECT_EQ(client.Finish(), FinishReason::kStop);
    EXPECT_EQ(std::ssize(client.Tokens()), at);
    EXPECT_EQ(h.decode_metrics.worker.generation_tokens.Value(), at);
    h.ExpectNoLeak();
  }
}

TEST_P(LoopSpeculationTest, NothingIsDraftedBeyondTheLastToken) {
  for (int max_tokens = 1; max_tokens < 12; ++max_tokens) {
    LoopHarness h(Speculating(GetParam(), {MakePrompt(8)}));
    Client& client = h.Submit(MakePrompt(8), Greedy(max_tokens));
    h.StepAll();
    h.ExpectFinished(client);
    // Every position but the last token's, once.
    EXPECT_EQ(h.runner.num_tokens(), 8 + max_tokens - 1);
    h.ExpectNoLeak();
  }
}

// The cache is told of full blocks only as far as their tokens were drawn: another prompt that goes
// on like the wrong draft, or like the answer, finds nothing false.
TEST_P(LoopSpeculationTest, TheCacheHoldsNothingOfAWrongDraft) {
  LoopHarness h(Speculating(GetParam(), {MakePrompt(8)}, 100));
  Client& client = h.Submit(MakePrompt(8), Greedy(37));
  while (!client.end.has_value()) {
    h.Step();
    // Each block that the router is told of is one of the sequence so far.
    const int known = 8 + static_cast<int>(client.Tokens().size());
    EXPECT_LE(std::ssize(h.stored), (known - (client.end.has_value() ? 1 : 0)) / 4);
  }
  h.ExpectFinished(client);
  std::vector<int32_t> next = MakePrompt(8);
  const std::vector<int32_t> answer = client.Tokens();
  next.insert(next.end(), answer.begin(), answer.end());
  Client& turn = h.Submit(next, Greedy(10));
  h.StepAll();
  h.ExpectFinished(turn);
  // All of the answer but its last token, in whole blocks.
  EXPECT_EQ(turn.events.back().cached_tokens, (8 + 37 - 1) / 4 * 4);
  h.ExpectNoLeak();
}

TEST_P(LoopSpeculationTest, ASequenceThatIsPreemptedDraftsAgain) {
  HarnessOptions options = Speculating(GetParam(), {MakePrompt(8, 1), MakePrompt(9, 2)}, 30);
  options.num_blocks = 12;
  LoopHarness h(options);
  Client& old = h.Submit(MakePrompt(8, 1), Greedy(30));
  Client& young = h.Submit(MakePrompt(9, 2), Greedy(30));
  h.StepAll();
  h.ExpectFinished(old);
  h.ExpectFinished(young);
  EXPECT_GE(young.events.back().timing->preemptions, 1);
  EXPECT_GT(Sum(young, &DraftCounts::accepted), 0);
  h.ExpectNoLeak();
}

TEST_P(LoopSpeculationTest, DraftsFollowAPrefillElsewhere) {
  HarnessOptions options = Speculating(GetParam(), {MakePrompt(20)});
  options.loop.admission.unified = false;
  options.loop.admission.local_prefill_max_tokens = 6;
  LoopHarness h(options);
  Client& client = h.Submit(MakePrompt(20), Greedy(16), 1);
  h.Step();
  h.Serve(*h.caller.calls.at(0));
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(h.runner.num_runs(), 3);  // five tokens each behind the first
  h.ExpectNoLeak();
}

INSTANTIATE_TEST_SUITE_P(All, LoopSpeculationTest, testing::Values(1, 2),
                         [](const auto& info) { return info.param == 1 ? "OneStep" : "TwoSteps"; });

// Drafts of `guess`, or none.
HarnessOptions Guessing(std::function<std::vector<int32_t>(std::span<const int32_t>)> guess) {
  class Guesses : public Drafter {
   public:
    explicit Guesses(decltype(guess) guess) : guess_(std::move(guess)) {}
    Draft Propose(std::span<const int32_t> tokens, int most) override {
      Draft draft{guess_(tokens), /*evidence=*/8};
      draft.tokens.resize(std::min(draft.tokens.size(), static_cast<size_t>(std::max(0, most))));
      return draft;
    }

   private:
    const decltype(guess) guess_;
  };
  HarnessOptions options = Speculating(2, {});
  options.loop.speculation.drafter = [guess] { return std::make_unique<Guesses>(guess); };
  return options;
}

TEST(LoopSpeculationAheadTest, WithoutAGuessTheNextStepIsLaunchedAhead) {
  LoopHarness h(Guessing([](std::span<const int32_t>) { return std::vector<int32_t>(); }));
  Client& client = h.Submit(MakePrompt(8), Greedy(6));
  h.Step();
  h.Step();
  // One of two was collected.
  EXPECT_EQ(client.Tokens().size(), 1u);
  EXPECT_EQ(h.last_load.running, 1);
  EXPECT_EQ(h.runner.num_launched(), 2);
  h.StepAll();
  h.ExpectFinished(client);
}

TEST(LoopSpeculationAheadTest, AGuessWaitsForTheTokenThatItContinues) {
  LoopHarness h(Guessing([](std::span<const int32_t>) { return std::vector<int32_t>{1, 2, 3}; }));
  Client& client = h.Submit(MakePrompt(8), Greedy(6));
  h.Step();
  h.Step();
  EXPECT_EQ(client.Tokens().size(), 1u);
  EXPECT_EQ(h.runner.num_launched(), 1);
  h.StepAll();
  h.ExpectFinished(client);
}

// One guessed token is the one that is drawn already: to wait for it saves nothing.
TEST(LoopSpeculationAheadTest, AGuessOfWhatIsDrawnAlreadyIsNotWaitedFor) {
  LoopHarness h(Guessing([](std::span<const int32_t>) { return std::vector<int32_t>{1}; }));
  h.Submit(MakePrompt(8), Greedy(6));
  h.Step();
  h.Step();
  EXPECT_EQ(h.runner.num_launched(), 2);
  h.StepAll();
}

// Where the host takes as long between two steps as a step does, an idle device costs a token.
TEST(LoopSpeculationAheadTest, AHostThatTakesLongIsNotWaitedFor) {
  HarnessOptions options = Guessing([](std::span<const int32_t> tokens) {
    return tokens.size() < 12 ? std::vector<int32_t>() : std::vector<int32_t>{1, 2, 3};
  });
  LoopHarness h(options);
  h.before_run = [&](const engine::Batch&) {
    h.clock.Advance(absl::Milliseconds(5));
    return absl::OkStatus();
  };
  Client& client = h.Submit(MakePrompt(8), Greedy(12));
  while (!client.end.has_value()) {
    h.clock.Advance(absl::Milliseconds(5));  // the host's, before it launches
    const int before = h.runner.num_launched();
    h.Step();
    if (client.Tokens().size() > 0 && client.Tokens().size() < 10) {
      EXPECT_EQ(h.runner.num_launched(), before + 1) << client.Tokens().size();
    }
  }
  h.ExpectFinished(client);
}

// Their drafts are never computed, for the token that is drawn is always another one.
TEST(LoopSpeculationAheadTest, GuessesThatAreWrongAreNotWaitedForLong) {
  LoopHarness h(Guessing([](std::span<const int32_t> tokens) {
    return tokens.size() % 4 == 1 ? std::vector<int32_t>{-1, 2, 3} : std::vector<int32_t>();
  }));
  h.before_run = [&](const engine::Batch&) {
    h.clock.Advance(absl::Milliseconds(5));
    return absl::OkStatus();
  };
  engine::SamplingParams sampling = Greedy(200);
  sampling.ignore_eos = true;
  Client& client = h.Submit(MakePrompt(8), sampling);
  int waits = 0;
  while (!client.end.has_value()) {
    h.clock.Advance(absl::Milliseconds(1));  // the host's, before it launches
    const int before = h.runner.num_launched();
    h.Step();
    waits += h.runner.num_launched() == before ? 1 : 0;
  }
  h.ExpectFinished(client);
  EXPECT_GT(waits, 0);
  EXPECT_LT(waits, 10);
}

}  // namespace
}  // namespace tandem::decode
