// One stream between a fake decode worker and a client that takes messages when the test says so.
// One thread, and a clock that stands still.
#include "router/request/request_stream.h"

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/refusal.h"
#include "common/base/status.h"
#include "simulation/fake_clock.h"
#include "tests/fakes/fake_decode_client.h"
#include "tests/fakes/recorded_spans.h"
#include "tests/support/paths.h"
#include "tests/unit/router/fake_capability.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// Keeps every message; no write ends by itself.
class RecordingSink : public StreamSink {
 public:
  void Write(const GenerateResponse& response) override { responses.push_back(response); }
  void Finish(const absl::Status& status) override {
    outcome = status;
    finished = true;
  }
  void Abort() override { aborted = true; }

  std::vector<GenerateResponse> responses;
  absl::Status outcome;
  bool finished = false;
  bool aborted = false;
};

// Sends every request to worker "d", which is another process each time unless it is said which.
class OneWorkerPolicy : public RoutingPolicy {
 public:
  absl::StatusOr<Route> Choose(const ClusterView&, const RouteQuery&) const override {
    Route route;
    route.decode.id = "d";
    route.decode.incarnation = incarnation != 0 ? incarnation : ++processes_;
    route.prefill = prefill;
    route.predicted_cached_tokens = 2;
    return route;
  }
  uint64_t incarnation = 0;
  std::vector<Route::Worker> prefill;

 private:
  mutable uint64_t processes_ = 1000;
};

class RequestStreamTest : public ::testing::Test {
 protected:
  Request MakeRequest() {
    Request request;
    request.id = "r";
    request.tokens = {1, 2, 3};
    request.max_tokens = 1'000'000;
    request.received = clock_.Now();
    request.deadline = clock_.Now() + absl::Seconds(60);
    return request;
  }
  void Begin() { Begin(MakeRequest()); }
  void Begin(Request request) {
    auto text = TextEmitter::Create(nullptr, {}, 0);
    ASSERT_OK(text);
    stream_ = std::make_shared<RequestStream>(
        std::move(request), *std::move(text), &sink_,
        StreamContext{&dispatcher_, &client_, &router_metrics_, &timers_, &clock_, &registry_,
                      &suspects_, &running_, &access_log_, migrate_, &spans_});
    stream_->Begin();
    dispatcher_.Step(absl::ZeroDuration());
  }
  void Advance(absl::Duration by) {
    clock_.Advance(by);
    timers_.FireDue();
    dispatcher_.Step(absl::ZeroDuration());
  }
  // The call ends so, and the dispatcher has its turn.
  void End(const absl::Status& status) {
    call().End(status);
    client_.Deliver();
    dispatcher_.Step(absl::ZeroDuration());
  }
  Registry::Member JoinAs(const std::string& id, uint64_t incarnation) {
    WorkerIdentity identity;
    identity.id = id;
    identity.incarnation = incarnation;
    identity.role = WorkerRole::kDecode;
    return *registry_.Join(identity, FakeCapability("m", 512), nullptr);
  }
  FakeDecodeCall& call() { return *client_.calls().back(); }

  FakeClock clock_;
  PrefixIndex index_;
  Registry registry_{{.model = "m"}, &index_, &clock_};
  Metrics metrics_;
  RouterMetrics router_metrics_{&metrics_};
  OneWorkerPolicy policy_;
  FakeDecodeClient client_;
  RecordingSink sink_;
  TimerQueue timers_{&clock_, nullptr};
  Dispatcher dispatcher_{{}, &registry_, &index_, &policy_, &router_metrics_, &clock_};
  SuspectPrompts suspects_{&clock_};
  RunningStreams running_;
  AccessLog access_log_;
  bool migrate_ = true;
  RecordedSpans spans_;
  std::shared_ptr<RequestStream> stream_;
};

TEST_F(RequestStreamTest, AStalledClientPausesTheWorkerAndLosesNothing) {
  constexpr int kEvents = 100, kPerEvent = 50;  // far more than may be pending
  Begin();
  for (int i = 0; i < kEvents; ++i) {
    call().Send(std::vector<int32_t>(kPerEvent, i),
                i + 1 == kEvents ? FinishReason::kLength : FinishReason::kNone);
  }
  call().End(absl::OkStatus());
  client_.Deliver();
  // The first message is with the client; behind it tokens pile up to the bound, and no further.
  ASSERT_EQ(sink_.responses.size(), 1u);
  const size_t taken = kEvents - call().unread();
  EXPECT_LE(taken * kPerEvent, kPerEvent + PendingResponse::kMaxTokens + kPerEvent);
  EXPECT_GE(taken * kPerEvent, PendingResponse::kMaxTokens);

  std::vector<int32_t> tokens;
  for (size_t i = 0; i < sink_.responses.size(); ++i) {
    const GenerateResponse response = sink_.responses[i];
    EXPECT_LT(response.token_ids.size(), PendingResponse::kMaxTokens + kPerEvent);
    tokens.insert(tokens.end(), response.token_ids.begin(), response.token_ids.end());
    EXPECT_EQ(response.completion_tokens, std::ssize(tokens));
    stream_->OnWritten(true);
    client_.Deliver();
  }
  EXPECT_TRUE(sink_.finished);
  EXPECT_OK(sink_.outcome);
  ASSERT_EQ(std::ssize(tokens), kEvents * kPerEvent);
  for (size_t i = 0; i < tokens.size(); ++i) {
    ASSERT_EQ(tokens[i], static_cast<int32_t>(i) / kPerEvent) << i;
  }
}

TEST_F(RequestStreamTest, StagesOfTheRouterAndOfTheWorkersMeetInTheTiming) {
  Request request = MakeRequest();
  request.tokenize_time = absl::Milliseconds(3);
  clock_.Advance(absl::Milliseconds(10));  // 3 of them tokenising, 7 on the way to the queue
  Begin(std::move(request));
  clock_.Advance(absl::Milliseconds(20));
  TokenEvent event;
  event.token_ids = {7};
  event.finish_reason = FinishReason::kStop;
  event.timing.emplace();
  event.timing->stages[Stage::kQueue] = 5;  // at the decode worker
  event.timing->stages[Stage::kPrefill] = 9;
  event.timing->prefill_worker = "p";
  call().Send(std::move(event));
  client_.Deliver();
  ASSERT_EQ(sink_.responses.size(), 1u);
  const Timing& timing = sink_.responses[0].timing.value();
  EXPECT_DOUBLE_EQ(timing.stages[Stage::kTokenize], 3);
  EXPECT_DOUBLE_EQ(timing.stages[Stage::kQueue], 7 + 5);
  EXPECT_DOUBLE_EQ(timing.stages[Stage::kPrefill], 9);
  EXPECT_DOUBLE_EQ(timing.stages[Stage::kDelivery], 30 - 3 - 12 - 9);
  EXPECT_DOUBLE_EQ(timing.stages[Stage::kTtft], 30);
  EXPECT_DOUBLE_EQ(timing.stages[Stage::kTotal], 30);
  EXPECT_EQ(timing.prefill_worker, "p");
  EXPECT_EQ(timing.decode_worker, "d");
}

TokenEvent Progress(int computed_tokens) {
  TokenEvent event;
  event.computed_tokens = computed_tokens;
  return event;
}

TEST_F(RequestStreamTest, ProgressIsNoFirstMessageOfTheAnswer) {
  Begin();
  call().Send(Progress(2));
  client_.Deliver();
  ASSERT_EQ(sink_.responses.size(), 1u);
  EXPECT_EQ(sink_.responses[0].computed_tokens, 2);
  EXPECT_EQ(sink_.responses[0].prompt_tokens, 3);
  stream_->OnWritten(true);
  clock_.Advance(absl::Milliseconds(40));
  call().Send({5}, FinishReason::kStop);
  client_.Deliver();
  ASSERT_EQ(sink_.responses.size(), 2u);
  EXPECT_EQ(sink_.responses[1].computed_tokens, std::nullopt);
  EXPECT_DOUBLE_EQ(sink_.responses[1].timing->stages[Stage::kTtft], 40);
}

TEST_F(RequestStreamTest, AWorkerLostAfterProgressAloneIsReplacedAndItsEndIsAStatus) {
  Begin();
  call().Send(Progress(2));
  client_.Deliver();
  stream_->OnWritten(true);
  End(Unavailable("gone"));
  ASSERT_EQ(client_.calls().size(), 2u);
  EXPECT_THAT(call().generated(), IsEmpty());
  call().Send(Progress(0));
  client_.Deliver();
  stream_->OnWritten(true);
  End(absl::InternalError("NaN"));
  EXPECT_TRUE(sink_.finished);
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kInternal);
  for (const GenerateResponse& response : sink_.responses) {
    EXPECT_EQ(response.finish_reason, FinishReason::kNone);
  }
}

TEST_F(RequestStreamTest, TheDeadlineEndsTheStreamAndTheWorkersCall) {
  Begin();
  call().Send({1});
  client_.Deliver();
  stream_->OnWritten(true);
  Advance(absl::Seconds(59));
  EXPECT_FALSE(call().cancelled());
  Advance(absl::Seconds(1));
  EXPECT_TRUE(call().cancelled());
  ASSERT_EQ(sink_.responses.size(), 2u);
  EXPECT_EQ(sink_.responses[1].finish_reason, FinishReason::kAbort);
  stream_->OnWritten(true);
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(sink_.aborted);
}

TEST_F(RequestStreamTest, AClientThatTakesNothingIsGivenUpSoonAfterTheDeadline) {
  Begin();
  call().Send({1});
  client_.Deliver();  // the client does not take it
  Advance(absl::Seconds(60));
  EXPECT_FALSE(sink_.aborted);
  Advance(absl::Seconds(2));
  EXPECT_TRUE(sink_.aborted);
  stream_->OnWritten(false);
  EXPECT_TRUE(sink_.finished);
  EXPECT_EQ(timers_.Next(), absl::InfiniteFuture());
}

// The worker has drawn the last token in time, but the client does not come to take it.
TEST_F(RequestStreamTest, AnAnswerWhoseEndNobodyTookWasNotServed) {
  for (const bool deadline : {true, false}) {
    sink_ = RecordingSink();
    Begin();
    call().Send({7});
    call().Send({8}, FinishReason::kLength);
    call().End(absl::OkStatus());
    client_.Deliver();
    ASSERT_EQ(sink_.responses.size(), 1u);
    EXPECT_THAT(sink_.responses[0].token_ids, ElementsAre(7));
    if (deadline) {
      Advance(absl::Seconds(60));
      EXPECT_TRUE(sink_.aborted);
      stream_->OnWritten(false);
    } else {
      stream_->OnClientGone();
      stream_->OnWritten(false);
    }
    EXPECT_TRUE(sink_.finished);
    EXPECT_EQ(sink_.outcome.code(),
              deadline ? absl::StatusCode::kDeadlineExceeded : absl::StatusCode::kCancelled);
  }
}

TEST_F(RequestStreamTest, AnEndedStreamLeavesNoTimer) {
  Begin();
  EXPECT_EQ(timers_.Next(), clock_.Now() + absl::Seconds(60));
  stream_->OnClientGone();
  EXPECT_TRUE(sink_.finished);
  EXPECT_EQ(timers_.Next(), absl::InfiniteFuture());
}

TEST_F(RequestStreamTest, EventsOfALostAttemptAreDropped) {
  Begin();
  const std::shared_ptr<FakeDecodeCall> first = client_.calls().front();
  first->End(Unavailable("gone"));
  client_.Deliver();
  dispatcher_.Step(absl::ZeroDuration());  // sent out again
  ASSERT_EQ(client_.calls().size(), 2u);
  call().Send({5}, FinishReason::kStop);
  client_.Deliver();
  ASSERT_EQ(sink_.responses.size(), 1u);
  EXPECT_THAT(sink_.responses[0].token_ids, ElementsAre(5));
}

TEST_F(RequestStreamTest, ARequestTakesTwoWorkersAlongAndNotMore) {
  Begin();
  for (int i = 0; i <= Retries::kMaxLost; ++i) {
    ASSERT_FALSE(sink_.finished);
    End(Unavailable("gone"));
  }
  std::printf("%zu workers lost\n", client_.calls().size());
  EXPECT_EQ(client_.calls().size(), 2u);
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(MessageOf(sink_.outcome), HasSubstr("2 workers were lost with this request"));
  EXPECT_THAT(MessageOf(sink_.outcome), HasSubstr("; before that at"));
  EXPECT_THAT(sink_.responses, IsEmpty());
}

// The decode worker lives, but two prefill workers died.
TEST_F(RequestStreamTest, PrefillWorkersThatAreLostCountToo) {
  policy_.prefill = {{.id = "p0"}, {.id = "p1"}};
  Begin();
  EXPECT_EQ(call().route().may_lose, 2);
  End(WithRefusal(Unavailable("p0"), {.reason = Refusal::Reason::kPrefill, .lost = 0b01}));
  Advance(absl::Seconds(1));
  ASSERT_EQ(client_.calls().size(), 2u);
  EXPECT_EQ(call().route().may_lose, 1);
  End(WithRefusal(Unavailable("p1"), {.reason = Refusal::Reason::kPrefill, .lost = 0b10}));
  EXPECT_TRUE(sink_.finished);
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kUnavailable);
}

// A worker that is struck once is lost once, however many calls to it break.
TEST_F(RequestStreamTest, OneStruckWorkerIsNotTwoLostOnes) {
  policy_.prefill = {{.id = "p0"}, {.id = "p1"}};
  Begin();
  for (int i = 0; i < 3; ++i) {
    End(WithRefusal(Unavailable("p0"), {.reason = Refusal::Reason::kPrefill, .lost = 0b01}));
    ASSERT_FALSE(sink_.finished) << sink_.outcome;
    Advance(absl::Seconds(2));
    ASSERT_EQ(std::ssize(client_.calls()), i + 2);
  }
  EXPECT_EQ(call().route().may_lose, 1);
  call().Send({1}, FinishReason::kStop);
  client_.Deliver();
  stream_->OnWritten(true);
  EXPECT_OK(sink_.outcome);
}

// One worker died, and a call to another one broke while both were in the cluster: which of the two
// lives shows a moment later.
TEST_F(RequestStreamTest, WhoTurnsOutToLiveWasNotLost) {
  const auto member = JoinAs("d", 1);
  Begin();  // some process that is not there
  policy_.incarnation = 1;
  End(Unavailable("gone"));
  ASSERT_EQ(client_.calls().size(), 2u);
  End(Unavailable("keepalive watchdog timeout"));
  EXPECT_FALSE(sink_.finished) << sink_.outcome;
  Advance(absl::Milliseconds(500));
  EXPECT_EQ(client_.calls().size(), 2u);
  registry_.Report(member, {});
  Advance(absl::Milliseconds(100));
  EXPECT_FALSE(sink_.finished) << sink_.outcome;
  ASSERT_EQ(client_.calls().size(), 3u);
  call().Send({1}, FinishReason::kStop);
  client_.Deliver();
  stream_->OnWritten(true);
  EXPECT_OK(sink_.outcome);
}

TEST_F(RequestStreamTest, WhoGivesNoSignOfLifeWasLost) {
  JoinAs("d", 1);
  Begin();
  policy_.incarnation = 1;
  End(Unavailable("gone"));
  ASSERT_EQ(client_.calls().size(), 2u);
  End(Unavailable("gone too"));
  EXPECT_FALSE(sink_.finished);
  for (int i = 0; i < 30 && !sink_.finished; ++i) Advance(absl::Milliseconds(100));
  EXPECT_TRUE(sink_.finished);
  EXPECT_EQ(client_.calls().size(), 2u);
  EXPECT_THAT(MessageOf(sink_.outcome), HasSubstr("2 workers were lost with this request"));
}

TEST_F(RequestStreamTest, WhoLeavesTheClusterIsNotWaitedFor) {
  const auto member = JoinAs("d", 1);
  Begin();
  policy_.incarnation = 1;
  End(Unavailable("gone"));
  ASSERT_EQ(client_.calls().size(), 2u);
  End(Unavailable("gone too"));
  registry_.Leave(member);
  Advance(absl::Milliseconds(100));
  EXPECT_TRUE(sink_.finished);
}

TEST_F(RequestStreamTest, AClientMayLeaveWhileItIsNotKnownWhoLives) {
  JoinAs("d", 1);
  Begin();
  policy_.incarnation = 1;
  End(Unavailable("gone"));
  ASSERT_EQ(client_.calls().size(), 2u);
  End(Unavailable("gone too"));
  stream_->OnClientGone();
  EXPECT_TRUE(sink_.finished);
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kCancelled);
  Advance(absl::Seconds(5));
  EXPECT_EQ(client_.calls().size(), 2u);
}

TEST_F(RequestStreamTest, WhatAWorkerSaysOfItsComputationIsFinal) {
  Begin();
  End(absl::InternalError("NaN"));
  EXPECT_EQ(client_.calls().size(), 1u);
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kInternal);
}

TEST_F(RequestStreamTest, APromptThatKilledTwoWorkersIsRefusedWhenItComesAgain) {
  const auto again = [&] {
    sink_ = {};
    Begin();
  };
  Begin();
  End(Unavailable("gone"));
  End(Unavailable("gone"));
  again();
  EXPECT_EQ(client_.calls().size(), 2u);  // sent to nobody
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(MessageOf(sink_.outcome), HasSubstr("2 workers died with this prompt"));
  EXPECT_EQ(router_metrics_.poison_refusals.Value(), 1);
  Advance(suspects_.memory());
  again();
  EXPECT_EQ(client_.calls().size(), 3u);
  End(Unavailable("gone"));
  call().Send({5}, FinishReason::kStop);
  client_.Deliver();
  EXPECT_TRUE(suspects_.empty());  // it was not to blame
}

TEST_F(RequestStreamTest, AStreamThatLosesItsWorkerGoesOnBehindItsTokens) {
  Begin();
  call().Send({1, 2, 3});
  client_.Deliver();
  stream_->OnWritten(true);
  clock_.Advance(absl::Milliseconds(10));
  End(Unavailable("gone"));
  ASSERT_FALSE(sink_.finished) << sink_.outcome;
  ASSERT_EQ(client_.calls().size(), 2u);
  EXPECT_THAT(call().generated(), ElementsAre(1, 2, 3));
  EXPECT_THAT(stream_->prompt().tokens, ElementsAre(1, 2, 3, 1, 2, 3));
  clock_.Advance(absl::Milliseconds(30));
  call().Send({4}, FinishReason::kStop);
  client_.Deliver();
  stream_->OnWritten(true);
  EXPECT_OK(sink_.outcome);
  ASSERT_EQ(sink_.responses.size(), 2u);
  const GenerateResponse& last = sink_.responses[1];
  EXPECT_THAT(last.token_ids, ElementsAre(4));
  EXPECT_EQ(last.completion_tokens, 4);
  EXPECT_EQ(last.timing->migrations, 1);
  EXPECT_DOUBLE_EQ(last.timing->stages[Stage::kMigration], 40);  // since token 3
  EXPECT_EQ(router_metrics_.migrations.Value(), 1);
}

TEST_F(RequestStreamTest, ATracedStreamHasASpanForEachWorkerThatItWasSentTo) {
  Request request = MakeRequest();
  request.trace = SampleTrace(1);
  request.trace.span = 7;
  request.tokenize_time = absl::Milliseconds(2);
  const absl::Time start = request.received;
  const TraceContext client = request.trace;
  clock_.Advance(absl::Milliseconds(2));
  Begin(std::move(request));
  const TraceContext first = call().trace();
  clock_.Advance(absl::Milliseconds(10));
  call().Send({1, 2, 3});
  client_.Deliver();
  clock_.Advance(absl::Milliseconds(10));
  stream_->OnWritten(true);
  End(Unavailable("gone"));
  clock_.Advance(absl::Milliseconds(20));
  call().Send({4}, FinishReason::kStop);
  client_.Deliver();
  EXPECT_THAT(spans_.traces, IsEmpty()) << "before the end";
  clock_.Advance(absl::Milliseconds(5));
  stream_->OnWritten(true);
  ASSERT_TRUE(sink_.finished);
  ASSERT_THAT(
      spans_.Lines(start),
      ElementsAre("tokenize [0, 2] OK", "queue [2, 2] OK", "decode_call [2, 22] UNAVAILABLE",
                  "queue [22, 22] OK", "migration [12, 42] OK", "decode_call [22, 42] OK",
                  "router.request [0, 47] OK"));
  const Span& request_span = spans_.traces[0].back();
  for (const Span& span : spans_.traces[0]) {
    EXPECT_EQ(span.context.trace, client.trace);
    const bool own = &span == &request_span;
    EXPECT_EQ(span.parent, own ? client.span : request_span.context.span);
  }
  // What each worker was told is its own call's span.
  EXPECT_EQ(first, spans_.traces[0][2].context);
  EXPECT_EQ(call().trace(), spans_.traces[0][5].context);
}

TEST_F(RequestStreamTest, WhatIsNotSampledIsHandedOnAsItCame) {
  Request request = MakeRequest();
  request.trace = SampleTrace(1);
  request.trace.span = 7;
  request.trace.sampled = false;
  const TraceContext client = request.trace;
  Begin(std::move(request));
  EXPECT_EQ(call().trace(), client);
  call().Send({1}, FinishReason::kStop);
  client_.Deliver();
  stream_->OnWritten(true);
  EXPECT_TRUE(sink_.finished);
  EXPECT_THAT(spans_.traces, IsEmpty());
}

TEST_F(RequestStreamTest, WhatWasDraftedIsCountedAcrossWorkers) {
  Begin();
  TokenEvent event;
  event.token_ids = {1, 2, 3};
  event.drafts = {4, 2};
  call().Send(event);
  client_.Deliver();
  stream_->OnWritten(true);
  End(Unavailable("gone"));
  ASSERT_EQ(client_.calls().size(), 2u);
  event.token_ids = {4};
  event.drafts = {1, 0};
  event.finish_reason = FinishReason::kStop;
  call().Send(event);
  client_.Deliver();
  ASSERT_EQ(sink_.responses.size(), 2u);
  EXPECT_EQ(sink_.responses[0].drafts.drafted, 4);
  EXPECT_EQ(sink_.responses[1].drafts.drafted, 5);
  EXPECT_EQ(sink_.responses[1].drafts.accepted, 2);
}

TEST_F(RequestStreamTest, AWorkerThatLeavesHandsItsStreamsOn) {
  Begin();
  for (int leaving = 1; leaving <= 5; ++leaving) {
    call().Send({leaving});
    client_.Deliver();
    stream_->OnWritten(true);
    End(WithRefusal(Unavailable("the worker stops"), {.reason = Refusal::Reason::kLeaving}));
    Advance(absl::Seconds(2));
    ASSERT_EQ(std::ssize(call().generated()), leaving);
  }
  EXPECT_FALSE(sink_.finished);
  EXPECT_TRUE(suspects_.empty());
}

TEST_F(RequestStreamTest, AStuckWorkerIsLeftWithoutWaitingForItsCall) {
  Begin();
  call().Send({1});
  client_.Deliver();
  stream_->OnWritten(true);
  ASSERT_EQ(running_.At("d").size(), 1u);
  running_.At("d")[0]->OnWorkerStuck("d", /*lost=*/false);
  EXPECT_FALSE(call().cancelled());  // it has tokens, and the worker may wake up
  running_.At("d")[0]->OnWorkerStuck("d", /*lost=*/true);
  EXPECT_TRUE(call().cancelled());
  EXPECT_TRUE(running_.At("d").empty());
  dispatcher_.Step(absl::ZeroDuration());
  client_.Deliver();  // the cancelled call ends, and nobody hears of it
  ASSERT_EQ(client_.calls().size(), 2u);
  EXPECT_THAT(call().generated(), ElementsAre(1));
  call().Send({2}, FinishReason::kStop);
  client_.Deliver();
  stream_->OnWritten(true);
  EXPECT_OK(sink_.outcome);
  EXPECT_TRUE(running_.At("d").empty());
}

TEST_F(RequestStreamTest, AStalledWorkerIsLeftBeforeTheFirstToken) {
  Begin();
  running_.At("d")[0]->OnWorkerStuck("d", /*lost=*/false);
  EXPECT_TRUE(call().cancelled());
  EXPECT_TRUE(running_.At("d").empty());
}

TEST_F(RequestStreamTest, WithoutMigrationALossAfterTheFirstTokenIsFinal) {
  migrate_ = false;
  Begin();
  call().Send({1});
  client_.Deliver();
  stream_->OnWritten(true);
  End(Unavailable("gone"));
  ASSERT_EQ(sink_.responses.size(), 2u);
  EXPECT_EQ(sink_.responses[1].finish_reason, FinishReason::kAbort);
  stream_->OnWritten(true);
  EXPECT_EQ(sink_.outcome.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(MessageOf(sink_.outcome), HasSubstr("was lost after 1 tokens"));
}

TEST_F(RequestStreamTest, MoreTokensThanAskedForAreCutOffWithTheirLogprobs) {
  Request request = MakeRequest();
  request.max_tokens = 2;
  Begin(std::move(request));
  TokenEvent event;
  event.token_ids = {1, 2, 3};
  for (const int32_t token : event.token_ids) event.logprobs.push_back({token, -1.0f, {}});
  event.finish_reason = FinishReason::kLength;
  call().Send(std::move(event));
  client_.Deliver();
  ASSERT_EQ(sink_.responses.size(), 1u);
  EXPECT_THAT(sink_.responses[0].token_ids, ElementsAre(1, 2));
  EXPECT_EQ(sink_.responses[0].logprobs.size(), 2u);
}

}  // namespace
}  // namespace tandem::router
