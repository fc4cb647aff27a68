// Blocks that come back from the decode worker: what is asked for, and what becomes of the prompt
// and of the blocks however that ends.
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "tests/support/paths.h"
#include "tests/unit/prefill_worker/loop_harness.h"

namespace tandem::prefill {
namespace {

std::vector<int32_t> MixedTokens(int count, int seed = 1) {
  std::vector<int32_t> out;
  for (int i = 0; i < count; ++i) out.push_back((seed * 131 + i * 7) % 900);
  return out;
}

int CountOf(LoopHarness& h, ReturnResult result) {
  return static_cast<int>(h.metrics.returns(result).Value());
}
int Computed(LoopHarness& h) { return static_cast<int>(h.worker_metrics.prompt_tokens.Value()); }

// A prompt of 100 tokens, 7 blocks, of which the caller holds 5.
class PrefillReturns : public testing::Test {
 protected:
  void SubmitAndStep(Work work) {
    work_ = work;
    h_.Submit(std::move(work));
    h_.Step();
  }
  void SubmitHeld() {
    SubmitAndStep(h_.MakeWorkOfHolder(MixedTokens(100), 5));
    ASSERT_EQ(h_.wanted.size(), 1u);
  }
  void ExpectServed() {
    h_.GiveBack(h_.wanted.at(0), work_.tokens);  // into the caller's own pool, at the least
    std::vector<int32_t> held = h_.CallersBlocks(100);
    held.resize(5);
    h_.ExpectRight(work_, held);
  }

  LoopHarness h_;
  Work work_;
};

TEST_F(PrefillReturns, WhatTheCallerHoldsIsNotComputed) {
  SubmitHeld();
  const Wanted asked = h_.wanted[0];
  EXPECT_EQ(asked.first_block, 0);
  EXPECT_EQ(asked.target.target_blocks.size(), 5u);
  EXPECT_EQ(asked.target.token, "token");
  EXPECT_EQ(h_.receiver.senders, std::vector<std::string>{"d0"});
  EXPECT_EQ(h_.loop->Load().waiting_tokens, 20);
  h_.Step();
  EXPECT_EQ(Computed(h_), 0) << "computed before the blocks were there";

  h_.GiveBack(asked, work_.tokens);
  h_.receiver.Seal(asked, 4096);
  h_.receiver.Quiet(asked);
  h_.RunToEnd();
  ExpectServed();
  EXPECT_EQ(Computed(h_), 20);
  const Outcome& outcome = *h_.replies.at(work_.id);
  EXPECT_EQ(outcome.cached_tokens, 80);
  EXPECT_EQ(outcome.returned_tokens, 80);
  EXPECT_GT(outcome.kv_return, absl::ZeroDuration());
  EXPECT_EQ(CountOf(h_, ReturnResult::kSealed), 1);
  EXPECT_EQ(h_.metrics.returned_tokens.Value(), 80);
  h_.ExpectNothingHeld();

  // They are cached as computed ones are: the next prompt that begins so asks for nothing.
  SubmitAndStep(h_.MakeWorkOfHolder(MixedTokens(100), 5));
  h_.RunToEnd();
  EXPECT_EQ(h_.wanted.size(), 1u);
  EXPECT_EQ(h_.replies.at(work_.id)->cached_tokens, 96);
  EXPECT_EQ(h_.replies.at(work_.id)->returned_tokens, 0);
}

TEST_F(PrefillReturns, ATracedPromptsWaitsLieAroundItsReturn) {
  Work work = h_.MakeWorkOfHolder(MixedTokens(100), 5);
  work.trace = SampleTrace(1);
  work.trace.span = 7;
  const absl::Time start = work.arrived;
  SubmitAndStep(std::move(work));
  h_.clock.Advance(absl::Milliseconds(10));
  h_.receiver.Fail(h_.wanted.at(0), absl::DataLossError("digest differs"));
  h_.receiver.Quiet(h_.wanted[0]);
  h_.RunToEnd();
  EXPECT_THAT(h_.spans.Lines(start),
              testing::ElementsAre("prefill_queue [0, 1] OK", "kv_return [1, 12] UNAVAILABLE",
                                   "prefill_queue [12, 12] OK", "prefill [12, 13] OK",
                                   "prefill.request [0, 13] OK"));
  EXPECT_EQ(h_.spans.traces.at(0).back().parent, 7u);

  SubmitAndStep(h_.MakeWork(MixedTokens(50)));  // which nobody traces
  h_.RunToEnd();
  EXPECT_EQ(h_.spans.traces.size(), 1u);
}

TEST_F(PrefillReturns, OnlyWhatIsNotCachedHereIsAskedFor) {
  h_.Submit(h_.MakeWork(MixedTokens(40)));
  h_.RunToEnd();
  SubmitHeld();
  EXPECT_EQ(h_.wanted[0].first_block, 2);
  EXPECT_EQ(h_.wanted[0].target.target_blocks.size(), 3u);
  h_.GiveBack(h_.wanted[0], work_.tokens);
  h_.receiver.Seal(h_.wanted[0], 1);
  h_.receiver.Quiet(h_.wanted[0]);
  h_.RunToEnd();
  ExpectServed();
  EXPECT_EQ(Computed(h_), 40 + 20);
}

// Its last token is computed, whatever the caller holds.
TEST_F(PrefillReturns, AWholePromptIsNotAskedFor) {
  SubmitAndStep(h_.MakeWorkOfHolder(MixedTokens(32), 2));
  ASSERT_EQ(h_.wanted.size(), 1u);
  EXPECT_EQ(h_.wanted[0].target.target_blocks.size(), 1u);
  h_.GiveBack(h_.wanted[0], work_.tokens);
  h_.receiver.Seal(h_.wanted[0], 1);
  h_.receiver.Quiet(h_.wanted[0]);
  h_.RunToEnd();
  ASSERT_OK(h_.replies.at(work_.id));
}

TEST_F(PrefillReturns, NothingIsAskedForWhereItWouldNotServe) {
  h_.Submit(h_.MakeWork(MixedTokens(100), 5));  // the caller offers nothing
  Work logprobs = h_.MakeWorkOfHolder(MixedTokens(100, 2), 5);
  logprobs.sampling.prompt_logprobs = 1;  // every token is computed
  h_.Submit(std::move(logprobs));
  h_.RunToEnd();
  EXPECT_TRUE(h_.wanted.empty());
  EXPECT_EQ(Computed(h_), 200);
}

TEST_F(PrefillReturns, WhatIsLostIsComputed) {
  SubmitHeld();
  h_.receiver.Fail(h_.wanted[0], absl::UnavailableError("the link was lost"));
  h_.Step();
  EXPECT_TRUE(h_.receiver.WasCancelled(h_.wanted[0]));
  EXPECT_EQ(h_.pool.counts().quarantined, 5) << "its sender may still write";
  h_.RunToEnd();
  ExpectServed();
  EXPECT_EQ(Computed(h_), 100);
  EXPECT_EQ(h_.replies.at(work_.id)->returned_tokens, 0);
  EXPECT_EQ(CountOf(h_, ReturnResult::kLost), 1);
  h_.receiver.Quiet(h_.wanted[0]);
  h_.Step();
  h_.ExpectNothingHeld();
}

TEST_F(PrefillReturns, DamageIsToldFromLoss) {
  SubmitHeld();
  h_.receiver.Fail(h_.wanted[0], absl::DataLossError("digest differs"));
  h_.receiver.Quiet(h_.wanted[0]);
  h_.RunToEnd();
  ExpectServed();
  EXPECT_EQ(CountOf(h_, ReturnResult::kDamaged), 1);
  h_.ExpectNothingHeld();
}

// What a writer that was given up on writes later meets no block that is in use.
TEST_F(PrefillReturns, ALateWriterHarmsNobody) {
  SubmitHeld();
  h_.clock.Advance(absl::Seconds(2));
  h_.Step();
  EXPECT_EQ(CountOf(h_, ReturnResult::kLate), 1);
  h_.GiveBack(h_.wanted[0], MixedTokens(100, 9));  // of another prompt
  h_.RunToEnd();
  h_.GiveBack(h_.wanted[0], MixedTokens(100, 9));
  ExpectServed();
  EXPECT_EQ(Computed(h_), 100);
  h_.receiver.Seal(h_.wanted[0], 1);  // too late
  h_.receiver.Quiet(h_.wanted[0]);
  h_.Step();
  h_.ExpectNothingHeld();
}

TEST_F(PrefillReturns, WhatGoesOnArrivingIsNotLate) {
  SubmitHeld();
  for (int i = 0; i < 5; ++i) {
    h_.receiver.bytes_arrived += 100;
    h_.clock.Advance(absl::Seconds(2));
    h_.Step();
  }
  EXPECT_EQ(CountOf(h_, ReturnResult::kLate), 0);
  h_.clock.Advance(absl::Seconds(2));
  h_.Step();
  EXPECT_EQ(CountOf(h_, ReturnResult::kLate), 1);
}

TEST_F(PrefillReturns, ACallerThatDoesNotKeepItsWordIsNotAskedForAWhile) {
  SubmitHeld();
  h_.receiver.Fail(h_.wanted[0], absl::UnavailableError("the link was lost"));
  h_.receiver.Quiet(h_.wanted[0]);
  h_.RunToEnd();
  h_.Submit(h_.MakeWorkOfHolder(MixedTokens(100, 2), 5));
  h_.RunToEnd();
  EXPECT_EQ(h_.wanted.size(), 1u);
  h_.clock.Advance(absl::Seconds(31));
  h_.Submit(h_.MakeWorkOfHolder(MixedTokens(100, 3), 5));
  h_.Step();
  ASSERT_EQ(h_.wanted.size(), 2u);
  // The second time it is left alone for twice as long.
  h_.receiver.Fail(h_.wanted[1], absl::UnavailableError("the link was lost"));
  h_.receiver.Quiet(h_.wanted[1]);
  h_.RunToEnd();
  h_.clock.Advance(absl::Seconds(31));
  h_.Submit(h_.MakeWorkOfHolder(MixedTokens(100, 4), 5));
  h_.RunToEnd();
  EXPECT_EQ(h_.wanted.size(), 2u);
}

TEST_F(PrefillReturns, CancelledAndLatePromptsLeaveNothing) {
  SubmitHeld();
  h_.inbox.Push(WorkCancelled{work_.id});
  h_.Step();
  EXPECT_EQ(h_.Code(work_.id), absl::StatusCode::kCancelled);
  EXPECT_EQ(h_.pool.counts().quarantined, 5);
  EXPECT_EQ(h_.pool.counts().used, 0);
  EXPECT_EQ(CountOf(h_, ReturnResult::kCancelled), 1);

  Work late = h_.MakeWorkOfHolder(MixedTokens(100, 2), 5);
  late.deadline = h_.clock.Now() + absl::Milliseconds(10);
  SubmitAndStep(std::move(late));
  ASSERT_EQ(h_.wanted.size(), 2u) << "a caller that gave up has not broken its word";
  h_.clock.Advance(absl::Milliseconds(20));
  h_.Step();
  EXPECT_EQ(h_.Code(work_.id), absl::StatusCode::kDeadlineExceeded);
  h_.receiver.Quiet(h_.wanted[0]);
  h_.receiver.Quiet(h_.wanted[1]);
  h_.Step();
  EXPECT_EQ(h_.pool.counts().quarantined, 0);
  h_.ExpectNothingHeld();
}

// What was computed on numbers that turn out to be broken is not built upon either.
TEST_F(PrefillReturns, ABrokenPrefixIsLookedForAgain) {
  // The first chunk of 64 tokens is cached before the last one shows that the numbers are broken.
  h_.breaks = [](const engine::BatchItem& item) { return item.start == 0; };
  const uint64_t broken = h_.Submit(h_.MakeWork(MixedTokens(100)));
  h_.Step();
  SubmitHeld();
  EXPECT_EQ(h_.wanted[0].first_block, 4);
  h_.breaks = nullptr;
  h_.Step();
  EXPECT_EQ(h_.Code(broken), absl::StatusCode::kInternal);
  h_.receiver.Seal(h_.wanted[0], 1);  // crossed with it
  h_.receiver.Quiet(h_.wanted[0]);
  h_.RunToEnd();
  ExpectServed();
  EXPECT_EQ(Computed(h_), 200);
  h_.ExpectNothingHeld();
}

// A full pool: the blocks of a return that is given up are fenced, and the prompt waits for others.
TEST(PrefillReturnsInAFullPool, APromptWaitsForBlocksAgain) {
  LoopHarness h({.num_blocks = 8});
  Work work = h.MakeWorkOfHolder(MixedTokens(100), 5);
  h.Submit(work);
  h.Step();
  ASSERT_EQ(h.wanted.size(), 1u);
  h.receiver.Fail(h.wanted[0], absl::UnavailableError("the link was lost"));
  h.Step();
  EXPECT_EQ(h.loop->Load().waiting, 1);
  EXPECT_EQ(h.pool.counts().quarantined, 5);
  h.receiver.Quiet(h.wanted[0]);
  h.RunToEnd();
  ASSERT_OK(h.replies.at(work.id));
  h.ExpectNothingHeld();
}

}  // namespace
}  // namespace tandem::prefill
