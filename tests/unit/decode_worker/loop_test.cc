// The loop's promises one by one; loop_random_test.cc has them all at once.
#include "decode_worker/loop.h"

#include <optional>
#include <thread>

#include "gmock/gmock.h"

#include "common/base/refusal.h"
#include "tests/unit/decode_worker/loop_harness.h"

namespace tandem::decode {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

HarnessOptions Options(int num_blocks = 64) {
  HarnessOptions options;
  options.num_blocks = num_blocks;
  options.loop.admission.limits.max_num_seqs = 8;
  options.loop.admission.limits.max_num_batched_tokens = 16;
  options.loop.admission.local_prefill_max_tokens = 6;
  return options;
}

HarnessOptions Unified(int num_blocks = 64) {
  HarnessOptions options = Options(num_blocks);
  options.loop.admission.unified = true;
  return options;
}

TEST(LoopTest, TheFirstTokenGoesOutBeforeItsKvIsHere) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(5), 1);
  h.StepAll();
  ASSERT_EQ(h.caller.calls.size(), 1u);
  FakeCall& call = *h.caller.calls[0];
  EXPECT_EQ(call.call.first_block, 0);
  EXPECT_EQ(call.call.block_ids.size(), 5u);
  EXPECT_EQ(call.call.token, "token");
  EXPECT_EQ(h.last_load.waiting, 1);
  h.clock.Advance(absl::Milliseconds(30));
  h.Reply(call);
  h.StepAll();
  EXPECT_EQ(client.Tokens().size(), 1u);
  EXPECT_EQ(h.runner.num_runs(), 0);
  h.clock.Advance(absl::Milliseconds(7));
  h.Write(call);
  h.Seal(call);
  h.Quiet(call);
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(h.runner.num_tokens(), 4);  // nothing of the prompt was computed here
  const Timing& timing = *client.events.back().timing;
  EXPECT_NEAR(timing.stages[Stage::kKvTransferExposed], 7, 0.01);
  EXPECT_GE(timing.stages[Stage::kKvTransferTotal], timing.stages[Stage::kKvTransferExposed]);
  EXPECT_EQ(timing.stages[Stage::kPrefillQueue], 1);
  EXPECT_EQ(timing.stages[Stage::kPrefill], 2);
  EXPECT_EQ(timing.transport, "tcp");
  EXPECT_EQ(timing.prefill_worker, "far");
  EXPECT_EQ(timing.prefill_attempts, 1);
  EXPECT_GT(timing.kv_bytes, 0u);
  EXPECT_EQ(client.events.back().cached_tokens, 3);  // as the prefill worker said
  h.ExpectNoLeak();
}

TEST(LoopTest, TheFirstTokenDoesNotWaitForTheRunningStep) {
  LoopHarness h(Options());
  Client& running = h.Submit(MakePrompt(5, 3), Greedy(20));
  h.Step();
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 1);
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 1u);
  size_t events_inside_the_step = 0;
  h.before_run = [&](const engine::Batch&) {
    if (h.caller.calls[0]->replied) return absl::OkStatus();
    h.clock.Advance(absl::Milliseconds(4));
    h.ReplyBesideTheStep(*h.caller.calls[0]);
    client.Read();
    events_inside_the_step = client.events.size();
    h.clock.Advance(absl::Milliseconds(30));
    return absl::OkStatus();
  };
  h.Step();
  EXPECT_EQ(events_inside_the_step, 1u);
  EXPECT_NEAR(client.events.at(0).timing->stages[Stage::kPrefillCall], 4 - 1 - 2, 0.01);
  h.Write(*h.caller.calls[0]);
  h.Seal(*h.caller.calls[0]);
  h.Quiet(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectFinished(client);
  h.ExpectFinished(running);
  h.ExpectNoLeak();
}

TEST(LoopTest, AFirstTokenThatIsOutIsNotDrawnAgain) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 2);
  h.Step();
  // The KV is lost just before the reply comes; the loop hears of both at once, KV first.
  h.FailKv(*h.caller.calls[0]);
  h.ReplyBesideTheStep(*h.caller.calls[0]);
  h.Quiet(*h.caller.calls[0]);
  h.StepAll();
  EXPECT_EQ(h.caller.calls.size(), 1u);  // the prompt is computed here
  h.ExpectFinished(client);
  // An attempt that was given up sends nothing.
  Client& other = h.Submit(MakePrompt(21, 5), Greedy(8), 2);
  h.Step();
  h.FailKv(*h.caller.calls[1]);
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 3u);
  h.ReplyBesideTheStep(*h.caller.calls[1]);
  h.Quiet(*h.caller.calls[1]);
  h.Step();
  EXPECT_TRUE(other.events.empty());
  h.Serve(*h.caller.calls[2]);
  h.StepAll();
  h.ExpectFinished(other);
  h.ExpectNoLeak();
}

TEST(LoopTest, ATracedRequestHasASpanForEachPrefillWorkerAndTransfer) {
  LoopHarness h(Options());
  h.trace = SampleTrace(1);
  h.trace.span = 7;
  const absl::Time start = h.clock.Now();
  Client& client = h.Submit(MakePrompt(20), Greedy(4), 2);
  h.Step();
  h.clock.Advance(absl::Milliseconds(10));
  h.ReplyError(*h.caller.calls.at(0), absl::UnavailableError("gone"));
  h.Quiet(*h.caller.calls[0]);
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 2u);
  h.clock.Advance(absl::Milliseconds(20));
  h.Serve(*h.caller.calls[1]);
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_THAT(h.spans.Lines(start),
              ElementsAre("queue [0, 0] OK", "prefill_call [0, 10] UNAVAILABLE",
                          "prefill_call [10, 30] OK", "kv_transfer [30, 30] OK",
                          "first_decode_step [30, 30] OK", "decode.request [0, 30] OK"));
  const std::vector<Span>& spans = h.spans.traces.at(0);
  EXPECT_EQ(spans.back().parent, 7u);
  // What each prefill worker was told is its own call's span.
  EXPECT_EQ(h.caller.calls[0]->call.trace, spans.at(1).context);
  EXPECT_EQ(h.caller.calls[1]->call.trace, spans.at(2).context);

  // Its KV is lost behind the first token.
  Client& other = h.Submit(MakePrompt(20, 5), Greedy(4), 1);
  h.Step();
  h.Reply(*h.caller.calls.at(2));
  h.Step();
  h.FailKv(*h.caller.calls[2]);
  h.Quiet(*h.caller.calls[2]);
  h.StepAll();
  h.ExpectFinished(other);
  EXPECT_THAT(
      h.spans.Lines(start),
      ElementsAre("queue [30, 30] OK", "prefill_call [30, 30] OK", "kv_transfer [30, 30] DATA_LOSS",
                  "first_decode_step [30, 30] OK", "decode.request [30, 30] OK"));

  h.trace = {};
  h.Submit(MakePrompt(20, 6), Greedy(4), 1);
  h.Step();
  EXPECT_FALSE(h.caller.calls.at(3)->call.trace.valid());
  h.Serve(*h.caller.calls[3]);
  h.StepAll();
  EXPECT_EQ(h.spans.traces.size(), 2u);
  h.ExpectNoLeak();
}

TEST(LoopTest, TellsHowFarAPromptIsThatIsComputedHere) {
  LoopHarness h(Unified());
  Client& client = h.Submit(MakePrompt(40), Greedy(5), 0, 0, absl::InfiniteDuration(), true);
  h.StepAll();
  EXPECT_THAT(client.Progress(), ElementsAre(16, 32));  // 0 was overtaken within the turn
  h.ExpectFinished(client);
  // What the prefix cache has counts as computed.
  Client& again = h.Submit(MakePrompt(80), Greedy(5), 0, 0, absl::InfiniteDuration(), true);
  h.StepAll();
  EXPECT_THAT(again.Progress(), ElementsAre(56, 72));
  Client& silent = h.Submit(MakePrompt(60, 7), Greedy(5));
  h.StepAll();
  EXPECT_THAT(silent.Progress(), IsEmpty());
  h.ExpectFinished(again);
  h.ExpectFinished(silent);
  h.ExpectNoLeak();
}

TEST(LoopTest, TellsHowFarAPromptIsThatIsComputedElsewhere) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(5), 2, 0, absl::InfiniteDuration(), true);
  h.Step();
  EXPECT_TRUE(h.caller.calls[0]->call.progress);
  const std::shared_ptr<FirstToken> lost = h.caller.calls[0]->call.first_token;
  lost->SendProgress(4);
  client.Read();
  lost->SendProgress(12);
  client.Read();
  h.ReplyError(*h.caller.calls[0], absl::UnavailableError("gone"));
  h.Quiet(*h.caller.calls[0]);
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 2u);
  lost->SendProgress(16);  // by nobody that is listened to
  const std::shared_ptr<FirstToken> next = h.caller.calls[1]->call.first_token;
  next->SendProgress(8);
  client.Read();
  h.ReplyBesideTheStep(*h.caller.calls[1]);
  next->SendProgress(16);
  h.Write(*h.caller.calls[1]);
  h.Seal(*h.caller.calls[1]);
  h.Quiet(*h.caller.calls[1]);
  h.StepAll();
  EXPECT_THAT(client.Progress(), ElementsAre(4, 12, 8));
  h.ExpectFinished(client);
  Client& silent = h.Submit(MakePrompt(20, 9), Greedy(5), 1);
  h.Step();
  EXPECT_FALSE(h.caller.calls[2]->call.progress);
  h.Serve(*h.caller.calls[2]);
  h.StepAll();
  h.ExpectFinished(silent);
  h.ExpectNoLeak();
}

TEST(LoopTest, KvBeforeTheReplyIsFine) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(5), 1);
  h.Step();
  FakeCall& call = *h.caller.calls[0];
  h.Write(call);
  h.Seal(call);
  h.Quiet(call);
  h.StepAll();
  EXPECT_TRUE(client.Tokens().empty());
  h.clock.Advance(absl::Seconds(1));
  h.Reply(call);
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(client.events.back().timing->stages[Stage::kKvTransferExposed], 0);
  h.ExpectNoLeak();
}

TEST(LoopTest, AnEndAtTheFirstTokenNeedsNoKv) {
  LoopHarness h(Options());
  Client& one = h.Submit(MakePrompt(20), Greedy(1), 1);
  engine::SamplingParams eos = Greedy(9);
  eos.eos_token_ids = {engine::FakeReferenceTokens(MakePrompt(21), Greedy(1), 100)[0]};
  Client& end = h.Submit(MakePrompt(21), eos, 1);
  h.Step();
  for (auto& call : h.caller.calls) h.Reply(*call);
  h.StepAll();
  h.ExpectFinished(one);
  EXPECT_EQ(one.Finish(), FinishReason::kLength);
  h.ExpectFinished(end);
  EXPECT_EQ(end.Finish(), FinishReason::kStop);
  // Of the first it was known before: nothing is shipped for it. The other's sender may still
  // write.
  EXPECT_EQ(h.caller.calls[0]->call.first_block, 5);
  EXPECT_TRUE(h.caller.calls[0]->call.block_ids.empty());
  EXPECT_EQ(h.pool.counts().quarantined, 6);
  for (auto& call : h.caller.calls) {
    EXPECT_TRUE(h.receiver.cancelled.contains(call->call.transfer.ToHex()));
    h.Quiet(*call);
  }
  h.StepAll();
  h.ExpectNoLeak();
}

TEST(LoopTest, HeldBlocksAreNotShippedAgain) {
  LoopHarness h(Options());
  std::vector<int32_t> prompt = MakePrompt(20);
  Client& first = h.Submit(prompt, Greedy(3), 1);
  h.Step();
  h.Serve(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectFinished(first);
  for (int i = 0; i < 10; ++i) prompt.push_back(900 + i);
  Client& second = h.Submit(prompt, Greedy(3), 1);
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 2u);
  const PrefillCall& call = h.caller.calls[1]->call;
  EXPECT_EQ(call.first_block, 5);
  EXPECT_EQ(call.block_ids.size(), 3u);
  EXPECT_EQ(call.tokens, prompt);
  h.Serve(*h.caller.calls[1]);
  h.StepAll();
  h.ExpectFinished(second);
  h.ExpectNoLeak();
}

TEST(LoopTest, ASecondTurnFindsTheFirstOne) {
  LoopHarness h(Options());
  Client& first = h.Submit(MakePrompt(20), Greedy(30), 1);
  h.Step();
  h.Serve(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectFinished(first);
  std::vector<int32_t> prompt = first.prompt;
  for (int32_t token : first.Tokens()) prompt.push_back(token);
  prompt.push_back(5);
  Client& second = h.Submit(prompt, Greedy(3), 1);
  h.StepAll();
  h.ExpectFinished(second);
  EXPECT_EQ(h.caller.calls.size(), 1u);  // so little is left that it is prefilled here
  EXPECT_EQ(second.events[0].cached_tokens, 48);
  EXPECT_EQ(second.events[0].timing->transport, "local");
  h.ExpectNoLeak();
}

TEST(LoopTest, AFullWorkerRefusesAtOnce) {
  HarnessOptions options = Options(12);
  options.loop.admission.limits.max_num_seqs = 2;
  options.loop.admission.limits.max_num_batched_tokens = 8;
  LoopHarness h(options);
  Client& a = h.Submit(MakePrompt(20, 1), Greedy(3), 1);  // 6 blocks
  Client& b = h.Submit(MakePrompt(28, 2), Greedy(3), 1);  // 8 blocks: not there
  Client& c = h.Submit(MakePrompt(4, 3), Greedy(1), 1);
  Client& d = h.Submit(MakePrompt(3, 4), Greedy(1), 1);  // a third one
  h.Step();
  ASSERT_TRUE(b.end.has_value() && d.end.has_value());
  EXPECT_TRUE(absl::IsResourceExhausted(*b.end));
  EXPECT_THAT(std::string(b.end->message()), HasSubstr("KV blocks"));
  EXPECT_TRUE(absl::IsResourceExhausted(*d.end));
  EXPECT_THAT(std::string(d.end->message()), HasSubstr("max_num_seqs = 2"));
  const std::optional<Refusal> no_blocks = RefusalOf(*b.end), no_place = RefusalOf(*d.end);
  ASSERT_TRUE(no_blocks.has_value() && no_place.has_value());
  EXPECT_EQ(no_blocks->reason, Refusal::Reason::kBlocks);
  EXPECT_EQ(no_blocks->needed, 8);
  EXPECT_EQ(no_blocks->available, 6);
  EXPECT_EQ(no_place->reason, Refusal::Reason::kSequences);
  EXPECT_EQ(no_place->available, 0);
  EXPECT_EQ(h.caller.calls.size(), 1u);
  h.Serve(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectFinished(a);
  h.ExpectFinished(c);
  h.ExpectNoLeak();
}

// What the router goes by: neither free nor cached blocks alone say it.
TEST(LoopTest, ReportsWhatANewcomerMayTake) {
  LoopHarness h(Options(12));
  h.Step();
  EXPECT_EQ(h.last_load.admits_blocks, 12);
  {
    const uint64_t ticket = h.pool.Quarantine(*h.pool.Reserve(4));
    h.clock.Advance(absl::Seconds(1));
    h.Step();
    EXPECT_EQ(h.last_load.admits_blocks, 8);
    h.pool.ReleaseQuarantine(ticket);
  }
  Client& a = h.Submit(MakePrompt(20, 1), Greedy(3), 1);  // 6 blocks
  h.Step();
  EXPECT_EQ(h.last_load.admits_blocks, 6);
  h.inbox.Push(worker::DrainWanted{});
  h.Step();
  EXPECT_EQ(h.last_load.admits_blocks, 0);
  h.Serve(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectFinished(a);
}

// Asking costs nothing, or a request that waits for room would keep its prefix from eviction.
TEST(LoopTest, ARefusedRequestLeavesTheCachesOrderAlone) {
  HarnessOptions options = Unified(16);
  LoopHarness h(options);
  for (int seed : {1, 2}) {
    Client& client = h.Submit(MakePrompt(17, seed), Greedy(2));  // 4 full blocks each
    h.StepAll();
    h.ExpectFinished(client);
  }
  const uint64_t queried = h.cache.query_tokens();
  {
    const engine::BlockLease held = *h.pool.Reserve(8);
    // The older prefix, and more than there is.
    Client& refused = h.Submit(MakePrompt(60, 1), Greedy(1));
    h.Step();
    ASSERT_TRUE(refused.end.has_value());
    EXPECT_TRUE(absl::IsResourceExhausted(*refused.end));
  }
  // The router tries another worker: nothing has failed.
  EXPECT_EQ(h.decode_metrics.worker.requests_rejected.Value(), 1);
  EXPECT_EQ(h.decode_metrics.worker.requests_failed.Value(), 0);
  EXPECT_EQ(h.cache.query_tokens(), queried);
  const engine::BlockLease held = *h.pool.Reserve(9);  // evicts one block: the older prefix's last
  const Hash128 seed = BlockHashSeed("", "", "");
  EXPECT_EQ(h.cache.CountMatch(seed, MakePrompt(17, 1), 4), 3);
  EXPECT_EQ(h.cache.CountMatch(seed, MakePrompt(17, 2), 4), 4);
}

TEST(LoopTest, ThePoolsLongestSequenceEndsByItsLength) {
  LoopHarness h(Unified(8));
  Client& longest = h.Submit(MakePrompt(31), Greedy(5));
  h.StepAll();
  h.ExpectFinished(longest);
  EXPECT_EQ(longest.Tokens().size(), 1u);
  EXPECT_EQ(longest.Finish(), FinishReason::kLength);
  h.ExpectNoLeak();
}

TEST(LoopTest, TheYoungestIsPreemptedAndLosesNoToken) {
  for (bool caching : {true, false}) {
    HarnessOptions options = Unified(12);
    options.caching = caching;
    LoopHarness h(options);
    Client& old = h.Submit(MakePrompt(8, 1), Greedy(30));
    Client& young = h.Submit(MakePrompt(9, 2), Greedy(30));
    for (int i = 0; i < 100; ++i) {
      h.Step();
      h.clock.Advance(absl::Milliseconds(1));
    }
    h.StepAll();
    h.ExpectFinished(old);
    h.ExpectFinished(young);
    EXPECT_EQ(old.events.back().timing->preemptions, 0);
    EXPECT_GE(young.events.back().timing->preemptions, 1);
    EXPECT_EQ(old.events.back().timing->stages[Stage::kPreempted], 0);
    EXPECT_GE(young.events.back().timing->stages[Stage::kPreempted], 5);
    EXPECT_EQ(h.decode_metrics.worker.preemptions.Value(), young.events.back().timing->preemptions);
    h.ExpectNoLeak();
  }
}

TEST(LoopTest, HigherPriorityKeepsItsBlocks) {
  LoopHarness h(Unified(12));
  Client& low = h.Submit(MakePrompt(8, 1), Greedy(30), 0, /*priority=*/0);
  Client& high = h.Submit(MakePrompt(9, 2), Greedy(30), 0, /*priority=*/1);
  h.StepAll();
  h.ExpectFinished(low);
  h.ExpectFinished(high);
  EXPECT_GE(low.events.back().timing->preemptions, 1);
  EXPECT_EQ(high.events.back().timing->preemptions, 0);
}

TEST(LoopTest, PromptLogprobsAreWholeWhateverHappens) {
  const auto run = [](LoopHarness& h, bool crowd) {
    engine::SamplingParams sampling = Greedy(4);
    sampling.prompt_logprobs = 1;
    sampling.logprobs = 2;
    Client& warm = h.Submit(MakePrompt(25, 2), Greedy(2), 0);  // its prefix is cached then
    h.StepAll();
    h.ExpectFinished(warm);
    if (crowd) h.Submit(MakePrompt(15, 1), Greedy(20));
    Client& client = h.Submit(MakePrompt(25, 2), sampling, crowd ? 0 : 1);
    h.StepAll();
    if (!h.caller.calls.empty()) h.Serve(*h.caller.calls.back());
    h.StepAll();
    h.ExpectFinished(client);
    std::vector<float> out;
    for (const TokenLogprob& logprob : client.events[0].prompt_logprobs) {
      EXPECT_EQ(logprob.top.size(), 1u);
      out.push_back(logprob.logprob);
    }
    h.ExpectNoLeak();
    return out;
  };
  LoopHarness calm(Unified());
  const std::vector<float> expected = run(calm, false);
  EXPECT_EQ(expected.size(), 24u);
  HarnessOptions options = Unified(12);
  options.loop.admission.limits.max_num_batched_tokens = 8;
  LoopHarness crowded(options);
  EXPECT_EQ(run(crowded, true), expected);
  // A decode worker that matched the prefix, but then computes the prompt itself.
  LoopHarness decode(Options());
  EXPECT_EQ(run(decode, false), expected);
}

TEST(LoopTest, ASlowReaderIsPausedAndItsNeighboursAreNot) {
  HarnessOptions options = Unified();
  options.loop.publish.max_pending_tokens = 4;
  LoopHarness h(options);
  Client& slow = h.Submit(MakePrompt(5, 1), Greedy(40));
  Client& quick = h.Submit(MakePrompt(5, 2), Greedy(40));
  slow.reading = false;
  h.StepAll();  // comes to rest: a paused sequence is not spun on
  h.ExpectFinished(quick);
  EXPECT_EQ(slow.stream->pending(), 4u);
  EXPECT_EQ(h.loop->num_sequences(), 1u);
  h.clock.Advance(absl::Seconds(3));
  slow.reading = true;
  slow.Read();
  h.StepAll();
  h.ExpectFinished(slow);
  EXPECT_EQ(slow.events.back().timing->stages[Stage::kPaused], 3000);
  EXPECT_LT(slow.events.size(), 40u);
  EXPECT_EQ(slow.events[0].token_ids.size(), 4u);  // coalesced
  h.ExpectNoLeak();
}

TEST(LoopTest, AReaderSlowForTooLongIsDropped) {
  HarnessOptions options = Unified();
  options.loop.publish.max_pending_tokens = 4;
  options.loop.publish.pause_limit = absl::Seconds(3);
  LoopHarness h(options);
  Client& slow = h.Submit(MakePrompt(5, 1), Greedy(40));
  slow.reading = false;
  h.StepAll();
  h.clock.Advance(absl::Seconds(3));
  h.StepAll();
  slow.reading = true;
  slow.Read();
  ASSERT_TRUE(slow.end.has_value());
  EXPECT_TRUE(absl::IsAborted(*slow.end));
  EXPECT_EQ(slow.Tokens().size(), 4u);
  h.ExpectNoLeak();
}

TEST(LoopTest, DeadlinesEndWhatWaits) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(5), 2, 0, absl::Seconds(2));
  Client& late = h.Submit(MakePrompt(20), Greedy(5), 2, 0, absl::ZeroDuration());
  h.Step();
  ASSERT_TRUE(late.end.has_value());
  EXPECT_TRUE(absl::IsDeadlineExceeded(*late.end));
  EXPECT_EQ(h.caller.calls[0]->call.deadline, h.clock.Now() + absl::Seconds(2));
  h.clock.Advance(absl::Seconds(2));
  h.Step();
  ASSERT_TRUE(client.end.has_value());
  EXPECT_TRUE(absl::IsDeadlineExceeded(*client.end));
  EXPECT_TRUE(h.caller.calls[0]->call_cancelled);
  EXPECT_EQ(h.pool.counts().quarantined, 6);
  h.Scribble(*h.caller.calls[0]);
  h.Quiet(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectNoLeak();
}

// Behind a prefill worker that does not get on, only what it needs to stay busy holds blocks here.
TEST(LoopTest, WhatWaitsForAQueuedPrefillHoldsNothing) {
  HarnessOptions options = Options(390);
  options.loop.admission.limits.max_num_seqs = 66;
  options.loop.admission.limits.max_num_batched_tokens = 80;
  options.loop.admission.max_model_len = 100;
  options.loop.prefill.window.tokens = 64;
  LoopHarness h(options);
  std::vector<Client*> waiting;
  for (int i = 0; i < 64; ++i) waiting.push_back(&h.Submit(MakePrompt(20, i), Greedy(3), 1));
  h.Step();
  EXPECT_EQ(h.caller.calls.size(), 3u);  // of 20 tokens, in a window of 64
  EXPECT_EQ(h.pool.counts().used, 3 * 6);
  EXPECT_EQ(h.last_load.waiting, 64);
  EXPECT_EQ(h.last_load.promised_sequences, 61);
  EXPECT_EQ(h.last_load.promised_blocks, 61 * 6);
  EXPECT_EQ(h.last_load.prefill_backlog.at("p0"), 61 * 20);
  EXPECT_GE(h.last_load.admits_blocks, 61 * 6);
  // What is computed here runs to its end, over all that is promised.
  std::vector<Client*> local;
  for (int i = 0; i < 8; ++i) local.push_back(&h.Submit(MakePrompt(6, 100 + i), Greedy(90)));
  h.StepAll();
  for (const Client* client : local) h.ExpectFinished(*client);
  // Of those that would wait as well, only as many are taken as there will be room for.
  Client& one_more = h.Submit(MakePrompt(20, 200), Greedy(3), 1);
  h.Step();
  ASSERT_TRUE(one_more.end.has_value());
  EXPECT_TRUE(absl::IsResourceExhausted(*one_more.end));
  EXPECT_EQ(RefusalOf(*one_more.end)->reason, Refusal::Reason::kBlocks);
  // A short prompt does not stand behind the long ones.
  Client& brief = h.Submit(MakePrompt(7, 201), Greedy(3), 1);
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 4u);
  EXPECT_EQ(h.caller.calls[3]->call.tokens.size(), 7u);
  for (size_t i = 0; i < h.caller.calls.size(); ++i) {
    h.Serve(*h.caller.calls[i]);
    h.StepAll();
  }
  h.ExpectFinished(brief);
  for (const Client* client : waiting) h.ExpectFinished(*client);
  EXPECT_EQ(h.loop->num_backlog(), 0);
  h.ExpectNoLeak();
}

// An answer of one token needs no blocks here, but its prompt costs the prefill worker as much.
TEST(LoopTest, PromptsOfOneTokenAnswersFillTheWindowToo) {
  HarnessOptions options = Options(390);
  options.loop.prefill.window.tokens = 64;
  LoopHarness h(options);
  std::vector<Client*> clients;
  for (int i = 0; i < 8; ++i) clients.push_back(&h.Submit(MakePrompt(20, i), Greedy(1), 1));
  h.Step();
  EXPECT_EQ(h.caller.calls.size(), 3u);
  EXPECT_EQ(h.last_load.prefill_backlog.at("p0"), 5 * 20);
  for (size_t i = 0; i < h.caller.calls.size(); ++i) {
    h.Serve(*h.caller.calls[i]);
    h.StepAll();
  }
  for (const Client* client : clients) h.ExpectFinished(*client);
  h.ExpectNoLeak();
}

// What stands in the backlog ends there: by its deadline, by its client, with the worker.
TEST(LoopTest, WhatWaitsToBeAskedForEndsWithoutACall) {
  HarnessOptions options = Options();
  options.loop.prefill.window.tokens = 40;
  auto h = std::make_unique<LoopHarness>(options);
  h->Submit(MakePrompt(20, 1), Greedy(3), 1);
  h->Submit(MakePrompt(20, 2), Greedy(3), 1);
  Client& late = h->Submit(MakePrompt(20, 3), Greedy(3), 1, 0, absl::Seconds(1));
  Client& cancelled = h->Submit(MakePrompt(20, 4), Greedy(3), 1);
  Client& stopped = h->Submit(MakePrompt(20, 5), Greedy(3), 1);
  h->Step();
  EXPECT_EQ(h->loop->num_backlog(), 3);
  h->Cancel(cancelled);
  h->clock.Advance(absl::Seconds(1));
  h->Step();
  ASSERT_TRUE(late.end.has_value() && cancelled.end.has_value());
  EXPECT_TRUE(absl::IsDeadlineExceeded(*late.end));
  EXPECT_TRUE(absl::IsCancelled(*cancelled.end));
  EXPECT_EQ(h->caller.calls.size(), 2u);
  h->loop.reset();
  stopped.Read();
  ASSERT_TRUE(stopped.end.has_value());
  EXPECT_TRUE(absl::IsUnavailable(*stopped.end));
  EXPECT_EQ(h->pool.counts().used, 0);
}

// What is computed here may take what is promised, but not for ever.
TEST(LoopTest, WhoseTurnHasComeIsNotStarvedByWhatIsComputedHere) {
  HarnessOptions options = Options(24);
  options.loop.prefill.window.tokens = 20;
  options.loop.admission.max_model_len = 80;
  LoopHarness h(options);
  h.Submit(MakePrompt(20, 1), Greedy(1), 1);  // needs no blocks here
  h.Submit(MakePrompt(20, 2), Greedy(1), 1);
  Client& big = h.Submit(MakePrompt(60, 3), Greedy(3), 1);  // 16 of 24 blocks
  h.Step();
  EXPECT_EQ(h.loop->num_backlog(), 1);
  std::vector<Client*> local;
  const auto submit_local = [&] {
    local.push_back(&h.Submit(MakePrompt(6, 10 + static_cast<int>(local.size())), Greedy(10)));
  };
  for (int i = 0; i < 4; ++i) submit_local();
  h.Step();
  for (int i = 0; i < 2; ++i) h.Serve(*h.caller.calls[static_cast<size_t>(i)]);
  for (int turn = 0; turn < 400 && h.caller.calls.size() < 3; ++turn) {
    submit_local();
    h.clock.Advance(absl::Milliseconds(20));
    h.Step();
  }
  ASSERT_EQ(h.caller.calls.size(), 3u) << "it never found room";
  h.Serve(*h.caller.calls[2]);
  h.StepAll();
  h.ExpectFinished(big);
  h.ExpectNoLeak();
}

TEST(LoopTest, KvThatNeverComesIsComputedHere) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 2);
  h.Step();
  h.Reply(*h.caller.calls[0]);
  h.StepAll();
  EXPECT_EQ(client.Tokens().size(), 1u);
  h.clock.Advance(absl::Seconds(10));
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(h.caller.calls.size(), 1u);
  EXPECT_EQ(h.decode_metrics.kv_recomputes.Value(), 1);
  EXPECT_EQ(client.events.back().timing->transport, "local");
  EXPECT_EQ(client.events.back().timing->stages[Stage::kKvTransferExposed], 10'000);
  EXPECT_EQ(h.pool.counts().quarantined, 6);
  h.Quiet(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectNoLeak();
}

TEST(LoopTest, ATransferThatMovesIsNotLate) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 1);
  h.Step();
  FakeCall& call = *h.caller.calls[0];
  h.Reply(call);
  for (int i = 0; i < 10; ++i) {  // 90 s, where 10 without progress are too many
    h.receiver.arrived[call.call.transfer.ToHex()] += 1000;
    h.Step();
    h.clock.Advance(absl::Seconds(9));
  }
  EXPECT_TRUE(h.receiver.cancelled.empty());
  EXPECT_EQ(h.decode_metrics.kv_recomputes.Value(), 0);
  h.Write(call);
  h.Seal(call);
  h.Quiet(call);
  h.StepAll();
  h.ExpectFinished(client);
  h.ExpectNoLeak();
}

TEST(LoopTest, EachFailedPrefillGetsANewTransferUntilNobodyIsLeft) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 2);
  h.Step();
  h.ReplyError(*h.caller.calls[0], absl::UnavailableError("gone"));
  h.Step();
  ASSERT_EQ(h.caller.calls.size(), 2u);
  const PrefillCall& a = h.caller.calls[0]->call;
  const PrefillCall& b = h.caller.calls[1]->call;
  EXPECT_EQ(b.peer.address, "host:1");
  EXPECT_NE(a.transfer, b.transfer);
  EXPECT_EQ(a.epoch, 1u);
  EXPECT_EQ(b.epoch, 2u);
  for (int32_t block : b.block_ids) {
    EXPECT_THAT(a.block_ids, testing::Not(testing::Contains(block)));
  }
  h.FailKv(*h.caller.calls[1]);
  h.Step();
  EXPECT_TRUE(h.caller.calls[1]->call_cancelled);
  EXPECT_EQ(h.decode_metrics.worker.KvLink("p1", "d0", "auto").failures.Value(), 1);
  ASSERT_TRUE(client.end.has_value());
  EXPECT_TRUE(absl::IsUnavailable(*client.end));
  EXPECT_EQ(h.pool.counts().quarantined, 12);
  for (auto& call : h.caller.calls) h.Quiet(*call);
  h.StepAll();
  h.ExpectNoLeak();
}

TEST(LoopTest, TheTimeOfAFailedPrefillIsNamed) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 2);
  h.Step();
  h.clock.Advance(absl::Seconds(2));
  h.ReplyError(*h.caller.calls[0], absl::UnavailableError("gone"));
  h.Step();
  h.Serve(*h.caller.calls.at(1));
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(client.events.back().timing->stages[Stage::kFailedAttempts], 2000);
}

// What killed two prefill workers would kill a third.
TEST(LoopTest, APromptTakesTwoPrefillWorkersAlongAndNotMore) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 3);
  for (size_t died = 0; died < 2; ++died) {
    h.Step();
    h.ReplyError(*h.caller.calls.at(died), absl::UnavailableError("gone"));
  }
  h.Step();
  EXPECT_EQ(h.caller.calls.size(), 2u);
  ASSERT_TRUE(client.end.has_value());
  EXPECT_THAT(client.end->ToString(), testing::HasSubstr("2 prefill workers were lost"));
  for (auto& call : h.caller.calls) h.Quiet(*call);
  h.StepAll();
  h.ExpectNoLeak();
}

// Whoever was not reached did not die of the prompt, so the router's rule for poison hears of none.
TEST(LoopTest, APrefillWorkerThatWasNotReachedWasNotLostToThePrompt) {
  const auto lost_with = [](std::vector<bool> reached) {
    LoopHarness h(Options());
    const int workers = static_cast<int>(reached.size());
    Client& client = h.Submit(MakePrompt(20), Greedy(8), workers);
    for (size_t i = 0; i < reached.size(); ++i) {
      h.Step();
      h.ReplyError(*h.caller.calls.at(i), absl::UnavailableError("gone"), reached[i]);
    }
    h.Step();
    EXPECT_TRUE(client.end.has_value());
    const std::optional<Refusal> refusal = RefusalOf(*client.end);
    for (auto& call : h.caller.calls) h.Quiet(*call);
    h.StepAll();
    h.ExpectNoLeak();
    return refusal.has_value() ? static_cast<int>(refusal->lost) : -1;
  };
  EXPECT_EQ(lost_with({false}), 0);
  EXPECT_EQ(lost_with({false, false, false}), 0);
  EXPECT_EQ(lost_with({true, false}), 0b01);
  EXPECT_EQ(lost_with({false, true}), 0b10);
  EXPECT_EQ(lost_with({true}), 0b01);
  EXPECT_EQ(lost_with({true, true}), 0b11);
}

TEST(LoopTest, NoBlocksForARetryIsUnavailable) {
  HarnessOptions options = Options(10);
  LoopHarness h(options);
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 2);  // 6 of 10 blocks
  h.Step();
  h.ReplyError(*h.caller.calls[0], absl::UnavailableError("gone"));
  h.Step();
  ASSERT_TRUE(client.end.has_value());
  EXPECT_TRUE(absl::IsUnavailable(*client.end));
  h.Quiet(*h.caller.calls[0]);
  h.StepAll();
  h.ExpectNoLeak();
}

TEST(LoopTest, SendersThatNeverAnswerCannotTakeThePool) {
  LoopHarness h(Options(22));
  for (int i = 0; i < 2; ++i) {  // 6 blocks each
    Client& client = h.Submit(MakePrompt(20, i), Greedy(8), 1);
    h.Step();
    h.Cancel(client);
    h.Step();
  }
  ASSERT_EQ(h.pool.counts().quarantined, 12);
  Client& asks = h.Submit(MakePrompt(20, 7), Greedy(2), 1);  // its 6 blocks are there
  Client& here = h.Submit(MakePrompt(20, 8), Greedy(2), 0);
  h.StepAll();
  ASSERT_TRUE(asks.end.has_value());
  EXPECT_TRUE(absl::IsResourceExhausted(*asks.end));
  EXPECT_THAT(std::string(asks.end->message()), HasSubstr("12 of 22 KV blocks wait for senders"));
  h.ExpectFinished(here);
  for (auto& call : h.caller.calls) h.Quiet(*call);
  h.StepAll();
  h.ExpectNoLeak();
}

TEST(LoopTest, BadPromptsAreNotTriedElsewhere) {
  LoopHarness h(Options());
  Client& client = h.Submit(MakePrompt(20), Greedy(8), 3);
  h.Step();
  h.ReplyError(*h.caller.calls[0], absl::InvalidArgumentError("token_ids[3]"));
  h.Quiet(*h.caller.calls[0]);
  h.StepAll();
  EXPECT_EQ(h.caller.calls.size(), 1u);
  ASSERT_TRUE(client.end.has_value());
  EXPECT_TRUE(absl::IsInvalidArgument(*client.end));
  h.ExpectNoLeak();
}

TEST(LoopTest, AFailedForwardPassEndsItsBatchAndTaintsNothing) {
  bool fail = false;
  LoopHarness h(Unified());
  h.before_run = [&fail](const engine::Batch&) {
    return fail ? absl::InternalError("broken") : absl::OkStatus();
  };
  Client& client = h.Submit(MakePrompt(20), Greedy(8));
  h.Step();
  fail = true;
  h.Step();
  ASSERT_TRUE(client.end.has_value());
  EXPECT_TRUE(absl::IsInternal(*client.end));
  fail = false;
  Client& again = h.Submit(MakePrompt(20), Greedy(8));
  h.StepAll();
  h.ExpectFinished(again);
  h.ExpectNoLeak();
}

TEST(LoopTest, ASequenceWithBrokenNumbersEndsAlone) {
  HarnessOptions options = Unified();
  options.item_status = [](const engine::BatchItem& item) {
    const bool broken = item.prompt_length == 21 && item.tokens.size() == 24;
    return broken ? absl::InternalError("NaN") : absl::OkStatus();
  };
  LoopHarness h(options);
  Client& lost = h.Submit(MakePrompt(21, 2), Greedy(8));
  Client& fine = h.Submit(MakePrompt(20), Greedy(8));
  h.StepAll();
  ASSERT_TRUE(lost.end.has_value());
  EXPECT_TRUE(absl::IsInternal(*lost.end));
  EXPECT_EQ(lost.Tokens().size(), 3u);
  h.ExpectFinished(fine);
  h.ExpectNoLeak();
}

TEST(LoopTest, APreemptionCachesNothingUnproven) {
  HarnessOptions options = Options(12);
  options.loop.admission.limits.max_num_seqs = 2;
  options.loop.admission.limits.max_num_batched_tokens = 3;
  LoopHarness h(options);
  Client& old = h.Submit(MakePrompt(4, 1), Greedy(30));
  h.Step();
  Client& young = h.Submit(MakePrompt(30, 2), Greedy(2));  // 2 tokens a step
  for (int i = 0; i < 100 && h.decode_metrics.worker.preemptions.Value() == 0; ++i) h.Step();
  ASSERT_EQ(h.decode_metrics.worker.preemptions.Value(), 1);
  ASSERT_TRUE(young.events.empty());
  // Whether its numbers are sound nobody knows before its last chunk.
  EXPECT_EQ(h.cache.CountMatch(BlockHashSeed("", "", ""), young.prompt, 7), 0);
  h.StepAll();
  h.ExpectFinished(old);
  h.ExpectFinished(young);
  EXPECT_EQ(h.cache.CountMatch(BlockHashSeed("", "", ""), young.prompt, 7), 7);
  h.ExpectNoLeak();
}

TEST(LoopTest, DrainingFinishesWhatRunsAndRefusesTheRest) {
  LoopHarness h(Unified());
  Client& running = h.Submit(MakePrompt(5), Greedy(5));
  h.Step();
  h.inbox.Push(worker::DrainWanted{});
  Client& late = h.Submit(MakePrompt(5), Greedy(5));
  h.Step();
  ASSERT_TRUE(late.end.has_value());
  EXPECT_TRUE(absl::IsUnavailable(*late.end));
  EXPECT_FALSE(h.loop->done());
  h.StepAll();
  h.ExpectFinished(running);
  EXPECT_TRUE(h.loop->done());
  h.ExpectNoLeak();
}

TEST(LoopTest, StoppingEndsEveryStream) {
  LoopHarness h(Options());
  Client& running = h.Submit(MakePrompt(5), Greedy(500));
  Client& away = h.Submit(MakePrompt(20), Greedy(5), 1);
  h.Step();
  Client& unseen = h.Submit(MakePrompt(5), Greedy(5));
  h.loop.reset();
  for (Client* client : {&running, &away, &unseen}) {
    client->Read();
    ASSERT_TRUE(client->end.has_value());
    EXPECT_TRUE(absl::IsUnavailable(*client->end));
  }
  EXPECT_EQ(h.pool.counts().used, 0);
}

TEST(LoopTest, ReportsLoadAndBlocks) {
  LoopHarness h(Unified());
  Client& client = h.Submit(MakePrompt(20), Greedy(50));
  h.Step();
  EXPECT_EQ(h.last_load.running, 1);
  EXPECT_EQ(h.last_load.blocks_used, 6);
  h.StepAll();
  h.ExpectFinished(client);
  EXPECT_EQ(h.last_load.running, 0);
  EXPECT_EQ(h.last_load.blocks_cached, 17);
  EXPECT_EQ(h.stored.size(), 17u);
  h.stored.clear();
  h.inbox.Push(worker::SnapshotWanted{});
  h.Step();
  EXPECT_EQ(h.stored.size(), 17u);
}

TEST(LoopTest, RunsOnAThreadOfItsOwn) {
  LoopHarness h(Unified());
  absl::Mutex mutex;
  bool ready = false;
  auto stream = std::make_shared<TokenStream>(
      [&] {
        absl::MutexLock lock(&mutex);
        ready = true;
      },
      nullptr);
  std::thread thread([&] { h.loop->Run(); });
  WorkArrived event;
  event.work.id = 1;
  event.work.tokens = MakePrompt(9);
  event.work.sampling = Greedy(20);
  event.stream = stream;
  h.inbox.Push(std::move(event));
  Client client;
  client.prompt = MakePrompt(9);
  client.sampling = Greedy(20);
  client.stream = stream;
  while (!client.end.has_value()) {
    mutex.LockWhen(absl::Condition(&ready));
    ready = false;
    mutex.Unlock();
    client.Read();
  }
  h.inbox.Push(worker::StopWanted{});
  thread.join();
  h.ExpectFinished(client);
  EXPECT_TRUE(h.inbox.closed());
}

TEST(LoadMeterTest, MedianAndRate) {
  LoadMeter meter(2048);
  EXPECT_EQ(meter.DecodeStepMilliseconds(), 0);
  EXPECT_EQ(meter.prefill_rate().TokensPerSecond(), 0);
  for (int ms : {5, 1, 9, 100, 4}) meter.AddStep(1, 0, absl::Milliseconds(ms));
  EXPECT_FLOAT_EQ(meter.DecodeStepMilliseconds(), 5);
  meter.AddStep(0, 100, absl::Milliseconds(50));
  EXPECT_FLOAT_EQ(meter.DecodeStepMilliseconds(), 5);
  EXPECT_FLOAT_EQ(meter.prefill_rate().TokensPerSecond(), 2000);
  for (int i = 0; i < 200; ++i) meter.AddStep(1, 0, absl::Milliseconds(2));
  EXPECT_FLOAT_EQ(meter.DecodeStepMilliseconds(), 2);
}

}  // namespace
}  // namespace tandem::decode
