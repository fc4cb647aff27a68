#include "prefill_worker/loop.h"

#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "prefill_worker/scheduler.h"
#include "tests/unit/prefill_worker/loop_harness.h"

namespace tandem::prefill {
namespace {

std::vector<int32_t> Tokens(int n, int first = 0) {
  std::vector<int32_t> tokens(static_cast<size_t>(n));
  std::iota(tokens.begin(), tokens.end(), first);
  for (int32_t& token : tokens) token %= 1000;
  return tokens;
}

TEST(PrefillLoop, OnePromptInOneChunk) {
  LoopHarness h;
  const Work work = h.MakeWork(Tokens(40));
  h.Submit(work);
  h.RunToEnd();
  h.ExpectRight(work);
  EXPECT_EQ(h.replies.at(work.id)->cached_tokens, 0);
  EXPECT_EQ(h.replies.at(work.id)->kv_bytes, 3 * h.engine.memory.region().layout.BlockBytes());
  EXPECT_EQ(h.runner.num_runs(), 1);
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, LengthsAroundBlockAndChunkBorders) {
  for (const int chunk : {1, 7, 16, 48}) {
    LoopHarness h({.max_num_batched_tokens = chunk, .caching = false});
    for (const int length : {1, 15, 16, 17, 31, 32, 33, 48, 49, 100}) {
      const Work work = h.MakeWork(Tokens(length, length));
      h.Submit(work);
      h.RunToEnd();
      SCOPED_TRACE(length);
      h.ExpectRight(work);
    }
    h.ExpectNothingHeld();
  }
}

TEST(PrefillLoop, TellsWhoAsksHowFarAPromptIs) {
  LoopHarness h;  // 64 tokens in a batch
  std::vector<int> progress;
  const auto submit = [&](int length) {
    Work work = h.MakeWork(Tokens(length));
    work.progress = [&, id = work.id](int computed) {
      EXPECT_FALSE(h.replies.contains(id));
      progress.push_back(computed);
    };
    h.Submit(work);
    h.RunToEnd();
    h.ExpectRight(work);
    return std::exchange(progress, {});
  };
  EXPECT_THAT(submit(200), testing::ElementsAre(0, 64, 128, 192));
  EXPECT_THAT(submit(300), testing::ElementsAre(192, 256));  // of which 192 are cached
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, SeveralPromptsShareForwardPasses) {
  LoopHarness h({.max_num_batched_tokens = 100});
  std::vector<Work> works;
  for (int i = 0; i < 6; ++i) works.push_back(h.MakeWork(Tokens(10 + 25 * i, 100 * i)));
  int most_items = 0;
  h.before_run = [&](const engine::Batch& batch) {
    most_items = std::max(most_items, static_cast<int>(batch.items.size()));
    return absl::OkStatus();
  };
  for (const Work& work : works) h.Submit(work);
  h.RunToEnd();
  for (const Work& work : works) h.ExpectRight(work);
  EXPECT_GT(most_items, 2);
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, BlocksAreShippedWhileThePromptIsComputed) {
  LoopHarness h({.max_num_batched_tokens = 32});
  const Work work = h.MakeWork(Tokens(100));
  h.Submit(work);
  h.Step();
  EXPECT_EQ(h.sender.num_pushed(work.target.id, 0), 2u * 2u);  // 2 blocks, 2 layers
  h.Step();
  EXPECT_EQ(h.sender.num_pushed(work.target.id, 0), 4u * 2u);
}

TEST(PrefillLoop, EachLayerIsWithTheSenderBeforeItIsComputedAndReadyAsSoonAsItIs) {
  // Right tokens at the receiver in the other tests prove that a layer is complete when it is
  // ready; here: that it does not wait for the layers after it.
  class LayerSpy : public engine::ModelRunner {
   public:
    absl::StatusOr<engine::LaunchedStep> Launch(const engine::Batch& batch) override {
      EXPECT_TRUE(batch.wants_layer_events);
      return engine::LaunchedStep{.id = 1, .layer_ready = {events_[0], events_[1]}};
    }
    absl::StatusOr<engine::StepOutput> Collect(engine::StepId) override {
      for (const auto& event : events_) {
        ready.push_back({num_ready(0), num_ready(1)});
        event->Set();
      }
      ready.push_back({num_ready(0), num_ready(1)});
      return absl::InternalError("done");
    }
    std::function<size_t(int layer)> num_ready;
    std::vector<std::pair<size_t, size_t>> ready;  // before the first layer, after each

   private:
    std::vector<std::shared_ptr<HostEvent>> events_ = {std::make_shared<HostEvent>(),
                                                       std::make_shared<HostEvent>()};
  };
  LayerSpy spy;
  LoopHarness h({.runner = &spy});
  const Work work = h.MakeWork(Tokens(40));
  spy.num_ready = [&](int layer) { return h.sender.num_ready(work.target.id, 0, layer); };
  h.Submit(work);
  h.Step();
  EXPECT_THAT(spy.ready, testing::ElementsAre(std::pair(0, 0), std::pair(3, 0), std::pair(3, 3)));
}

TEST(PrefillLoop, SecondTurnComesFromTheCache) {
  LoopHarness h;
  const Work first = h.MakeWork(Tokens(64));
  h.Submit(first);
  h.RunToEnd();
  const Work second = h.MakeWork(Tokens(90));
  h.Submit(second);
  h.RunToEnd();
  h.ExpectRight(second);
  EXPECT_EQ(h.replies.at(second.id)->cached_tokens, 64);
  EXPECT_EQ(h.runner.num_tokens(), 64 + 26);
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, PromptsThatCameTogetherShareWhatTheFirstComputed) {
  LoopHarness h({.max_num_batched_tokens = 64, .max_num_seqs = 1});
  std::vector<Work> works;
  for (int i = 0; i < 4; ++i) {
    std::vector<int32_t> tokens = Tokens(64);
    tokens.push_back(500 + i);
    works.push_back(h.MakeWork(std::move(tokens), /*first_block=*/i == 3 ? 1 : 0));
  }
  for (const Work& work : works) h.Submit(work);
  h.RunToEnd();
  EXPECT_EQ(h.runner.num_tokens(), 65 + 3 * 1);
  for (size_t i = 0; i < works.size(); ++i) {
    h.ExpectRight(works[i],
                  i == 3 ? std::vector{works[0].target.target_blocks[0]} : std::vector<int32_t>{});
    EXPECT_EQ(h.replies.at(works[i].id)->cached_tokens, i == 0 ? 0 : 64);
  }
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, AtLeastTheLastTokenIsComputed) {
  LoopHarness h;
  for (int i = 0; i < 2; ++i) {
    const Work work = h.MakeWork(Tokens(64));
    h.Submit(work);
    h.RunToEnd();
    h.ExpectRight(work);
    EXPECT_EQ(h.replies.at(work.id)->cached_tokens, i == 0 ? 0 : 48);
  }
}

TEST(PrefillLoop, AnotherSaltSharesNothing) {
  LoopHarness h;
  h.Submit(h.MakeWork(Tokens(64)));
  h.RunToEnd();
  Work work = h.MakeWork(Tokens(64));
  work.cache_salt = "tenant";
  h.Submit(work);
  h.RunToEnd();
  EXPECT_EQ(h.replies.at(work.id)->cached_tokens, 0);
}

TEST(PrefillLoop, BlocksThatTheReceiverHoldsAreNotShipped) {
  LoopHarness h;
  const Work first = h.MakeWork(Tokens(48));
  h.Submit(first);
  h.RunToEnd();
  for (const int cached_at_sender : {0, 3}) {
    if (cached_at_sender == 0) h.cache.Clear();
    const Work second = h.MakeWork(Tokens(70), /*first_block=*/3);
    h.Submit(second);
    h.RunToEnd();
    h.ExpectRight(second, first.target.target_blocks);
    EXPECT_EQ(h.replies.at(second.id)->kv_bytes, 2 * h.engine.memory.region().layout.BlockBytes());
  }
}

TEST(PrefillLoop, PromptLogprobsCoverTheWholePromptWhateverIsCached) {
  LoopHarness h({.max_num_batched_tokens = 10});
  h.Submit(h.MakeWork(Tokens(40)));
  h.RunToEnd();
  Work work = h.MakeWork(Tokens(40));
  work.sampling.prompt_logprobs = 2;
  h.Submit(work);
  h.RunToEnd();
  h.ExpectRight(work);
  const auto& logprobs = h.replies.at(work.id)->prompt_logprobs;
  ASSERT_EQ(logprobs.size(), 39u);
  for (int i = 0; i < 39; ++i) EXPECT_EQ(logprobs[static_cast<size_t>(i)].token, i + 1);
}

TEST(PrefillLoop, ShortPromptOvertakesALongOne) {
  LoopHarness h({.num_blocks = 128});
  const Work lengthy = h.MakeWork(Tokens(1500));
  const Work brief = h.MakeWork(Tokens(20, 500));
  h.Submit(lengthy);
  h.Step();
  h.Submit(brief);
  h.Step();
  EXPECT_TRUE(h.replies.contains(brief.id));
  EXPECT_FALSE(h.replies.contains(lengthy.id));
  h.RunToEnd();
  h.ExpectRight(lengthy);
}

TEST(PrefillLoop, FullPoolMakesPromptsWait) {
  LoopHarness h({.num_blocks = 4});
  h.sender.complete_at_once = false;
  const Work first = h.MakeWork(Tokens(60));
  const Work second = h.MakeWork(Tokens(60, 500));
  h.Submit(first);
  h.Submit(second);
  h.RunToEnd();
  EXPECT_TRUE(h.replies.contains(first.id));
  EXPECT_FALSE(h.replies.contains(second.id));  // first's blocks are still being read
  EXPECT_EQ(h.loop->Load().waiting, 1);
  EXPECT_EQ(h.loop->Load().waiting_tokens, 60);
  h.sender.Complete(first.target.id, 0, absl::OkStatus());
  h.RunToEnd();
  h.ExpectRight(second);
  h.sender.Complete(second.target.id, 0, absl::OkStatus());
  h.RunToEnd();
  h.ExpectNothingHeld();
}

// Small prompts come so that the pool is never empty, and pass the one that needs all of it; after
// a while they wait behind it.
TEST(PrefillLoop, ABigPromptIsNotPassedForever) {
  LoopHarness h({.num_blocks = 4});
  h.sender.complete_at_once = false;
  Work held = h.MakeWork(Tokens(10, 100));
  h.Submit(held);
  h.Step();
  const Work big = h.MakeWork(Tokens(60));
  h.Submit(big);
  for (int i = 1; i < 5 * kMaxTimesPassed; ++i) {
    const Work small = h.MakeWork(Tokens(10, 100 + i));
    h.Submit(small);
    h.Step();
    h.sender.Complete(held.target.id, 0, absl::OkStatus());
    if (!h.replies.contains(small.id)) break;  // it waits behind the big one
    held = small;
    h.Step();
  }
  for (int i = 0; i < 3; ++i) h.Step();
  EXPECT_TRUE(h.replies.contains(big.id));
}

TEST(PrefillLoop, PromptThatCanNeverFitIsRefused) {
  LoopHarness h({.num_blocks = 4});
  const uint64_t id = h.Submit(h.MakeWork(Tokens(65)));
  h.Step();
  EXPECT_EQ(h.Code(id), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(h.replies.at(id).status().message()),
              testing::HasSubstr("65 prompt tokens need 5 KV blocks, the worker's pool has 4"));
}

TEST(PrefillLoop, TooManyWaitingAreRefused) {
  LoopHarness h({.num_blocks = 4, .max_waiting = 2});
  h.sender.complete_at_once = false;
  h.Submit(h.MakeWork(Tokens(64)));
  h.RunToEnd();
  h.Submit(h.MakeWork(Tokens(64, 100)));
  h.Submit(h.MakeWork(Tokens(64, 200)));
  const uint64_t refused = h.Submit(h.MakeWork(Tokens(64, 300)));
  h.Step();
  EXPECT_EQ(h.Code(refused), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(h.loop->Load().waiting, 2);
  h.sender.complete_at_once = true;
  h.sender.Complete(h.sender.open()[0].first, 0, absl::OkStatus());
  h.RunToEnd();
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, RepeatedTransferIsRefused) {
  LoopHarness h({.max_num_batched_tokens = 16});
  const Work work = h.MakeWork(Tokens(40));
  Work again = h.MakeWork(Tokens(40));
  again.target.id = work.target.id;
  h.Submit(work);
  h.Step();
  h.Submit(again);
  h.Step();
  EXPECT_EQ(h.Code(again.id), absl::StatusCode::kAlreadyExists);
  h.RunToEnd();
  h.ExpectRight(work);
  Work late = h.MakeWork(Tokens(40));
  late.target.id = work.target.id;
  h.Submit(late);
  h.RunToEnd();
  EXPECT_EQ(h.Code(late.id), absl::StatusCode::kAlreadyExists);
  Work next_epoch = h.MakeWork(Tokens(40));
  next_epoch.target.id = work.target.id;
  next_epoch.target.epoch = 1;
  h.Submit(next_epoch);
  h.RunToEnd();
  h.ExpectRight(next_epoch);
}

TEST(PrefillLoop, CancelAtEveryTurnLeaksNothing) {
  for (int turns = 0; turns < 12; ++turns) {
    SCOPED_TRACE(turns);
    LoopHarness h({.num_blocks = 16, .max_num_batched_tokens = 16});
    h.sender.complete_at_once = false;
    const Work other = h.MakeWork(Tokens(100, 300));
    const Work work = h.MakeWork(Tokens(130));  // waits for blocks until `other` is done
    h.Submit(other);
    h.Submit(work);
    for (int i = 0; i < turns; ++i) h.Step();
    if (turns > 8) h.sender.Complete(other.target.id, 0, absl::OkStatus());
    if (turns > 8) h.Step();
    h.inbox.Push(WorkCancelled{work.id});
    h.Step();
    EXPECT_EQ(h.Code(work.id), absl::StatusCode::kCancelled);
    for (const auto& [id, epoch] : h.sender.open()) {
      if (id == work.target.id) h.sender.Complete(id, epoch, absl::AbortedError("aborted"));
    }
    h.RunToEnd();
    if (turns <= 8) h.sender.Complete(other.target.id, 0, absl::OkStatus());
    h.RunToEnd();
    h.ExpectRight(other);
    h.ExpectNothingHeld();
  }
}

TEST(PrefillLoop, CancelledPromptKeepsItsBlocksUntilTheSenderIsQuiet) {
  LoopHarness h({.max_num_batched_tokens = 32});
  h.sender.complete_at_once = false;
  const Work work = h.MakeWork(Tokens(100));
  h.Submit(work);
  h.Step();
  h.inbox.Push(WorkCancelled{work.id});
  h.Step();
  EXPECT_EQ(h.Code(work.id), absl::StatusCode::kCancelled);
  EXPECT_EQ(h.pool.counts().used, 7);
  const int runs = h.runner.num_runs();
  h.Step();
  EXPECT_EQ(h.runner.num_runs(), runs);  // nothing is computed for it any more
  h.sender.Complete(work.target.id, 0, absl::AbortedError("aborted"));
  h.RunToEnd();
  h.ExpectNothingHeld();
  h.inbox.Push(WorkCancelled{work.id});  // late: ignored
  h.RunToEnd();
}

// Whether or not its caller has cancelled it.
TEST(PrefillLoop, WhatIsPastItsDeadlineIsDroppedWhereverItStands) {
  LoopHarness h({.num_blocks = 16, .max_num_batched_tokens = 32});
  h.sender.complete_at_once = false;
  const auto with_deadline = [&](std::vector<int32_t> tokens, absl::Duration left) {
    Work work = h.MakeWork(std::move(tokens));
    work.deadline = h.clock.Now() + left;
    return work;
  };
  // Before a chunk of it: it came too late.
  const Work late = with_deadline(Tokens(40, 1), absl::ZeroDuration());
  h.Submit(late);
  h.Step();
  EXPECT_EQ(h.Code(late.id), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(h.runner.num_tokens(), 0);
  EXPECT_EQ(h.sender.num_open(), 0u);
  // Between two chunks; and while it waits for the blocks of that one.
  const Work begun = with_deadline(Tokens(200, 2), absl::Seconds(1));
  const Work waits = with_deadline(Tokens(100, 3), absl::Seconds(1));
  h.Submit(begun);
  h.Submit(waits);
  h.Step();
  EXPECT_EQ(h.runner.num_tokens(), 32);
  h.clock.Advance(absl::Seconds(1));
  h.Step();
  EXPECT_EQ(h.Code(begun.id), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(h.Code(waits.id), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(h.runner.num_tokens(), 32);
  EXPECT_TRUE(h.sender.aborted(begun.target.id, 0));
  h.sender.Complete(begun.target.id, 0, absl::AbortedError("aborted"));
  // Computed, and on its way.
  const Work shipped = with_deadline(Tokens(20, 4), absl::Seconds(1));
  h.Submit(shipped);
  h.RunToEnd();
  EXPECT_EQ(h.Code(shipped.id), absl::StatusCode::kOk);
  EXPECT_FALSE(h.sender.aborted(shipped.target.id, 0));
  h.clock.Advance(absl::Seconds(1));
  h.Step();
  EXPECT_TRUE(h.sender.aborted(shipped.target.id, 0));
  h.sender.Complete(shipped.target.id, 0, absl::AbortedError("aborted"));
  h.RunToEnd();
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, LostPeerEndsThePromptAndFreesItsBlocks) {
  LoopHarness h({.max_num_batched_tokens = 32});
  h.sender.complete_at_once = false;
  const Work work = h.MakeWork(Tokens(100));
  h.Submit(work);
  h.Step();
  h.sender.Complete(work.target.id, 0, absl::UnavailableError("connection reset"));
  h.RunToEnd();
  EXPECT_EQ(h.Code(work.id), absl::StatusCode::kUnavailable);
  h.ExpectNothingHeld();
  EXPECT_THAT(h.engine.metrics.Render(),
              testing::HasSubstr("tandem_kv_transfer_failures_total{dst=\"d0\",src=\"p0\","
                                 "transport=\"tcp\"} 1"));
}

TEST(PrefillLoop, PeerLostAfterTheReplyFreesTheBlocks) {
  LoopHarness h;
  h.sender.complete_at_once = false;
  const Work work = h.MakeWork(Tokens(40));
  h.Submit(work);
  h.RunToEnd();
  h.ExpectRight(work);
  EXPECT_EQ(h.pool.counts().used, 3);
  h.sender.Complete(work.target.id, 0, absl::UnavailableError("connection reset"));
  h.RunToEnd();
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, TheNextChunkIsLaunchedBeforeTheLastIsCollected) {
  LoopHarness h({.max_num_batched_tokens = 32, .max_in_flight = 2});
  const Work work = h.MakeWork(Tokens(100));
  h.Submit(work);
  h.Step();
  EXPECT_EQ(h.runner.num_runs(), 0);  // the fake computes when it is collected
  h.Step();
  EXPECT_EQ(h.runner.num_runs(), 1);
  h.RunToEnd();
  EXPECT_EQ(h.runner.num_tokens(), 100);
  h.ExpectRight(work);
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, BlocksOfALostPromptWaitForItsLaunchedStep) {
  LoopHarness h({.max_num_batched_tokens = 32, .max_in_flight = 2});
  h.sender.complete_at_once = false;
  const Work work = h.MakeWork(Tokens(100));
  h.Submit(work);
  h.Step();
  h.Step();
  h.sender.Complete(work.target.id, 0, absl::UnavailableError("connection reset"));
  int quarantined = -1;
  h.before_run = [&](const engine::Batch&) {
    quarantined = h.pool.counts().quarantined;
    return absl::OkStatus();
  };
  h.Step();
  EXPECT_EQ(h.Code(work.id), absl::StatusCode::kUnavailable);
  EXPECT_EQ(quarantined, 7);  // all: the two that were cached are not proven, so they go too
  h.RunToEnd();
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, UnusableTargetIsReported) {
  LoopHarness h;
  h.sender.open_error = absl::InvalidArgumentError("unknown transport \"pigeon\"");
  const uint64_t id = h.Submit(h.MakeWork(Tokens(40)));
  h.RunToEnd();
  EXPECT_EQ(h.Code(id), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(h.replies.at(id).status().message()), testing::HasSubstr("pigeon"));
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, FailedForwardPassFailsItsPromptsOnly) {
  LoopHarness h;
  const uint64_t lost = h.Submit(h.MakeWork(Tokens(40)));
  h.before_run = [](const engine::Batch&) { return absl::InternalError("out of luck"); };
  h.Step();
  h.before_run = nullptr;
  EXPECT_EQ(h.Code(lost), absl::StatusCode::kInternal);
  const Work next = h.MakeWork(Tokens(40));
  h.Submit(next);
  h.RunToEnd();
  h.ExpectRight(next);
  EXPECT_EQ(h.replies.at(next.id)->cached_tokens, 0);
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, PromptWithBrokenNumbersFailsAlone) {
  LoopHarness h;
  h.item_status = [](const engine::BatchItem& item) {
    return item.prompt_length == 20 ? absl::InternalError("NaN") : absl::OkStatus();
  };
  const uint64_t lost = h.Submit(h.MakeWork(Tokens(20)));
  const Work next = h.MakeWork(Tokens(30, 7));
  h.Submit(next);
  h.RunToEnd();
  EXPECT_EQ(h.Code(lost), absl::StatusCode::kInternal);
  h.ExpectRight(next);
  h.ExpectNothingHeld();
}

// A fault that shows only in the logits of the last chunk, long after the first one was published.
TEST(PrefillLoop, BrokenNumbersDoNotStayInTheCache) {
  LoopHarness h;  // 64 tokens a step
  bool faulty = true;
  h.item_status = [&](const engine::BatchItem&) {
    return faulty ? absl::InternalError("NaN") : absl::OkStatus();
  };
  const std::vector<int32_t> prompt = Tokens(100);
  const uint64_t lost = h.Submit(h.MakeWork(prompt));
  h.Step();
  // Comes between the fault and its discovery, and takes over what is broken.
  const uint64_t misled = h.Submit(h.MakeWork(prompt));
  h.RunToEnd();
  EXPECT_EQ(h.Code(lost), absl::StatusCode::kInternal);
  EXPECT_EQ(h.Code(misled), absl::StatusCode::kUnavailable);  // its caller asks elsewhere
  faulty = false;
  for (int i = 0; i < 6; ++i) {
    const Work work = h.MakeWork(prompt);
    h.Submit(work);
    h.RunToEnd();
    h.ExpectRight(work);
    EXPECT_EQ(h.replies.at(work.id)->cached_tokens, i == 0 ? 0 : 96);
  }
  h.ExpectNothingHeld();
}

// Nobody sees the logits that would have shown it.
TEST(PrefillLoop, BrokenNumbersOfAPromptThatIsGivenUpDoNotStayInTheCache) {
  const auto cancel = [](LoopHarness* h, const Work& work) {
    h->inbox.Push(WorkCancelled{work.id});
  };
  const auto let_deadline_pass = [](LoopHarness* h, const Work& work) {
    h->clock.Advance(work.deadline - h->clock.Now());
  };
  const auto lose_peer = [](LoopHarness* h, const Work& work) {
    h->inbox.Push(KvShipped{work.target.id, work.target.epoch, absl::UnavailableError("gone"), {}});
  };
  using GiveUp = std::function<void(LoopHarness*, const Work&)>;
  for (const GiveUp& give_up : {GiveUp(cancel), GiveUp(let_deadline_pass), GiveUp(lose_peer)}) {
    LoopHarness h;  // 64 tokens a step
    h.breaks = [](const engine::BatchItem&) { return true; };
    const std::vector<int32_t> prompt = Tokens(200);
    Work given_up = h.MakeWork(prompt);
    given_up.deadline = h.clock.Now() + absl::Seconds(1);
    h.Submit(given_up);
    h.Step();
    h.breaks = nullptr;
    give_up(&h, given_up);
    h.Step();
    const Work next = h.MakeWork(prompt);
    h.Submit(next);
    h.RunToEnd();
    h.ExpectRight(next);
    EXPECT_EQ(h.replies.at(next.id)->cached_tokens, 0);
  }
}

TEST(PrefillLoop, ABlockDamagedInTheCacheIsComputedAgain) {
  LoopHarness h;
  const std::vector<int32_t> prompt = Tokens(100);
  h.Submit(h.MakeWork(prompt));
  h.RunToEnd();
  const int32_t third = h.cache.Match(BlockHashSeed("", "", ""), prompt, 3).blocks()[2];
  h.engine.memory.region().Block(1, third)[5] ^= std::byte{4};
  const Work next = h.MakeWork(prompt);
  h.Submit(next);
  h.RunToEnd();
  h.ExpectRight(next);
  EXPECT_EQ(h.replies.at(next.id)->cached_tokens, 32);  // what lies before it
  EXPECT_EQ(h.worker_metrics.damaged_blocks.Value(), 1);
  const Work again = h.MakeWork(prompt);
  h.Submit(again);
  h.RunToEnd();
  h.ExpectRight(again);
  EXPECT_EQ(h.replies.at(again.id)->cached_tokens, 96);
  h.ExpectNothingHeld();
}

TEST(PrefillLoop, DrainingFinishesWhatRunsAndRefusesTheRest) {
  LoopHarness h({.max_num_batched_tokens = 16});
  const Work work = h.MakeWork(Tokens(60));
  h.Submit(work);
  h.Step();
  h.inbox.Push(worker::DrainWanted{});
  const uint64_t refused = h.Submit(h.MakeWork(Tokens(10)));
  h.loop->Run();
  h.ExpectRight(work);
  EXPECT_EQ(h.Code(refused), absl::StatusCode::kUnavailable);
  h.ExpectNothingHeld();
  EXPECT_TRUE(h.inbox.closed());
}

TEST(PrefillLoop, StopGivesEverythingUp) {
  LoopHarness h({.num_blocks = 8, .max_num_batched_tokens = 16});
  const uint64_t running = h.Submit(h.MakeWork(Tokens(100)));
  const uint64_t waiting = h.Submit(h.MakeWork(Tokens(100, 500)));
  h.Step();
  h.inbox.Push(worker::StopWanted{});
  const uint64_t late = h.Submit(h.MakeWork(Tokens(10)));
  h.loop->Run();
  for (const uint64_t id : {running, waiting, late}) {
    EXPECT_EQ(h.Code(id), absl::StatusCode::kUnavailable);
  }
}

TEST(PrefillLoop, ReportsLoadAndBlocks) {
  LoopHarness h;
  h.Submit(h.MakeWork(Tokens(64)));
  h.RunToEnd();
  h.clock.Advance(absl::Seconds(1));
  h.Step();
  ASSERT_FALSE(h.reports.empty());
  EXPECT_EQ(h.reports.back().running, 0);
  EXPECT_EQ(h.reports.back().blocks_cached, 4);
  size_t stored = 0;
  for (const engine::BlockEvents& events : h.block_events) stored += events.stored.size();
  EXPECT_EQ(stored, 4u);
  h.inbox.Push(worker::SnapshotWanted{});
  h.Step();
  EXPECT_EQ(h.block_events.back().stored.size(), 4u);
  EXPECT_THAT(h.engine.metrics.Render(),
              testing::HasSubstr("tandem_kv_blocks{state=\"cached\"} 4"));
  EXPECT_THAT(h.engine.metrics.Render(),
              testing::HasSubstr("tandem_prefix_cache_query_tokens_total 64"));
}

}  // namespace
}  // namespace tandem::prefill
