// The router as a client sees it, before workers that are only scripts.
#include "router/router_server.h"

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "gtest/gtest.h"

#include "common/base/refusal.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "tandem/internal/v1/cluster.grpc.pb.h"
#include "tandem/v1/admin.grpc.pb.h"
#include "tandem/v1/inference.grpc.pb.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"
#include "tests/unit/router/fake_capability.h"
#include "tests/unit/router/fake_worker.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

using Call = std::shared_ptr<FakeCall>;

struct Reply {
  std::vector<v1::GenerateResponse> messages;
  grpc::Status status;

  std::string text() const {
    std::string out;
    for (const auto& message : messages) out += message.text();
    return out;
  }
  std::vector<int32_t> tokens() const {
    std::vector<int32_t> out;
    for (const auto& m : messages)
      out.insert(out.end(), m.token_ids().begin(), m.token_ids().end());
    return out;
  }
};

// Polls a condition that some thread will make true; fails after 20 s.
void Await(const std::function<bool()>& condition) {
  const absl::Time limit = absl::Now() + absl::Seconds(20);
  while (!condition()) {
    ASSERT_LT(absl::Now(), limit) << "the condition did not come true";
    absl::SleepFor(absl::Milliseconds(1));
  }
}

class RouterServerTest : public ::testing::Test {
 protected:
  RouterServerTest() {
    options_.core.dispatcher.no_worker_timeout = absl::Seconds(20);
    options_.core.dispatcher.queue_timeout = absl::Seconds(20);
  }

  void StartRouter() {
    auto model = ServedModel::Load(SourcePath("models/demo"), "demo");
    ASSERT_OK(model);
    vocab_size_ = static_cast<uint32_t>(model->config.vocab_size);
    auto router = RouterServer::Start(options_, *std::move(model), &metrics_, Clock::Real());
    ASSERT_OK(router);
    router_ = *std::move(router);
    channel_ = MakeChannel(router_->address());
    stub_ = v1::Inference::NewStub(channel_);
    admin_ = v1::Admin::NewStub(MakeChannel(
        router_->internal_address(), *TestCredentials(kOperatorRole, "test"), {kRouterRole, ""}));
  }

  std::unique_ptr<FakeWorker> Join(const std::string& id, const std::string& role,
                                   FakeDecodeService::Handler handler = {}) {
    internal::v1::Capability capability = FakeCapability("demo", vocab_size_);
    const ModelConfig& config = router_->model().config;
    capability.set_num_layers(static_cast<uint32_t>(config.num_layers));
    capability.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
    capability.set_head_dim(static_cast<uint32_t>(config.head_dim));
    return std::make_unique<FakeWorker>(router_->internal_address(), id, role, capability,
                                        std::move(handler));
  }

  std::vector<int32_t> Tokens(const std::string& text) const {
    std::vector<int32_t> ids;
    EXPECT_OK(router_->model().tokenizer->Encode(text, false, &ids));
    return ids;
  }

  static v1::GenerateRequest Prompt(const std::string& text) {
    v1::GenerateRequest request;
    request.set_text(text);
    return request;
  }

  Reply Generate(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    return Generate(&context, request);
  }
  Reply Generate(grpc::ClientContext* context, const v1::GenerateRequest& request) {
    Reply reply;
    auto reader = stub_->Generate(context, request);
    v1::GenerateResponse message;
    while (reader->Read(&message)) reply.messages.push_back(message);
    reply.status = reader->Finish();
    return reply;
  }

  v1::GetClusterResponse Cluster() {
    grpc::ClientContext context;
    v1::GetClusterResponse response;
    EXPECT_TRUE(admin_->GetCluster(&context, {}, &response).ok());
    return response;
  }

  RouterServerOptions options_;
  Metrics metrics_;
  std::unique_ptr<RouterServer> router_;
  uint32_t vocab_size_ = 0;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Inference::Stub> stub_;
  std::unique_ptr<v1::Admin::Stub> admin_;
};

TEST_F(RouterServerTest, StreamsTextUsageAndTiming) {
  StartRouter();
  const std::vector<int32_t> answer = Tokens("caf\xC3\xA9 \xE2\x82\xAC 42");
  internal::v1::DecodeRequest seen;
  auto prefill = Join("p", "prefill");
  auto decode = Join("d", "decode", [&](Call call) {
    seen = call->request();
    for (size_t i = 0; i < answer.size(); ++i) {
      internal::v1::TokenEvent event;
      event.add_token_ids(static_cast<uint32_t>(answer[i]));
      event.set_cached_tokens(3);
      event.set_drafted_tokens(2);
      event.set_accepted_tokens(1);
      event.mutable_timing()->set_prefill(5);
      event.mutable_timing()->set_prefill_worker("p");
      if (i + 1 == answer.size()) event.set_finish_reason(v1::FINISH_REASON_STOP);
      call->Send(std::move(event));
    }
    call->End(grpc::Status::OK);
  });
  const Reply reply = Generate(Prompt("What is it?"));
  ASSERT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.text(), "caf\xC3\xA9 \xE2\x82\xAC 42");
  EXPECT_EQ(reply.tokens(), answer);
  for (const auto& message : reply.messages) {
    EXPECT_EQ(message.usage().prompt_tokens(), Tokens("What is it?").size());
    EXPECT_EQ(message.usage().cached_tokens(), 3u);
    EXPECT_EQ(message.has_timing(), &message == &reply.messages.back());
  }
  const v1::GenerateResponse& last = reply.messages.back();
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(last.usage().completion_tokens(), answer.size());
  EXPECT_EQ(last.usage().drafted_tokens(), 2 * answer.size());
  EXPECT_EQ(last.usage().accepted_tokens(), answer.size());
  EXPECT_EQ(last.timing().prefill(), 5);
  EXPECT_EQ(last.timing().prefill_worker(), "p");
  EXPECT_EQ(last.timing().decode_worker(), "d");
  EXPECT_GE(last.timing().total(), last.timing().ttft());

  // What the worker got: all sampling fields, and where to prefill.
  ASSERT_EQ(seen.route().prefill_size(), 1);
  EXPECT_EQ(seen.route().prefill(0).worker_id(), "p");
  EXPECT_TRUE(seen.sampling().has_seed() && seen.sampling().has_temperature() &&
              seen.sampling().has_top_p() && seen.sampling().has_max_tokens());
  EXPECT_FALSE(seen.sampling().has_logprobs());
  EXPECT_GT(seen.eos_token_ids_size(), 0);
  EXPECT_THAT(metrics_.Render(), HasSubstr("tandem_requests_total{code=\"OK\"} 1"));
}

TEST_F(RouterServerTest, AStopStringAcrossTokensEndsTheStreamAndTheWorkersCall) {
  StartRouter();
  Call held;
  absl::Notification called;
  auto worker = Join("u", "unified", [&](Call call) {
    held = call;
    for (const int32_t token : Tokens("one two END three")) call->Send({token});
    called.Notify();
  });
  v1::GenerateRequest request = Prompt("go");
  request.mutable_sampling()->add_stop("two END");
  const Reply reply = Generate(request);
  EXPECT_TRUE(reply.status.ok());
  EXPECT_EQ(reply.text(), "one ");
  EXPECT_EQ(reply.messages.back().finish_reason(), v1::FINISH_REASON_STOP);
  called.WaitForNotification();
  held->AwaitCancel();
}

TEST_F(RouterServerTest, StopStringsWaitForMinTokens) {
  StartRouter();
  const std::vector<int32_t> first = Tokens("stop"), second = Tokens(" and stop");
  auto worker = Join("u", "unified", [&](Call call) {
    call->Send(first);
    call->Send(second);
  });
  v1::GenerateRequest request = Prompt("go");
  request.mutable_sampling()->add_stop("stop");
  request.mutable_sampling()->set_min_tokens(static_cast<uint32_t>(first.size()));
  EXPECT_EQ(Generate(request).text(), "stop and ");
}

TEST_F(RouterServerTest, AWorkerLostBeforeTheFirstTokenIsReplaced) {
  StartRouter();
  std::atomic<int> a_calls{0}, b_calls{0};
  // Equal costs: "a" comes first.
  auto a = Join("a", "unified", [&](Call call) {
    ++a_calls;
    call->End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone"));
  });
  auto b = Join("b", "unified", [&](Call call) {
    ++b_calls;
    call->Send(Tokens("ok"), v1::FINISH_REASON_STOP);
    call->End(grpc::Status::OK);
  });
  const Reply reply = Generate(Prompt("go"));
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.text(), "ok");
  EXPECT_EQ(reply.messages.back().timing().decode_worker(), "b");
  EXPECT_EQ(a_calls, 1);
  EXPECT_EQ(b_calls, 1);
  EXPECT_THAT(metrics_.Render(), HasSubstr("tandem_retries_total{reason=\"worker_lost\"} 1"));
}

// Though the worker goes on all the time, and so was not lost.
TEST_F(RouterServerTest, RetriesAreBounded) {
  StartRouter();
  std::atomic<int> calls{0};
  auto a = Join("a", "unified", [&](Call call) {
    ++calls;
    call->End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone"));
  });
  const Reply reply = Generate(Prompt("go"));
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(reply.status.error_message(), HasSubstr("'a'"));
  EXPECT_THAT(reply.messages, IsEmpty());
  EXPECT_GE(calls, Retries::kMaxBrokenSlowly);
  EXPECT_LT(calls, Retries::kMaxBroken);
}

TEST_F(RouterServerTest, AWorkerLostAfterTheFirstTokenIsReplacedBehindWhatItSent) {
  StartRouter();
  std::atomic<int> calls{0};
  internal::v1::DecodeRequest resumed;
  const auto serve = [&](Call call) {
    if (calls++ == 0) {
      call->Send(Tokens("half"));
      call->End(grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone"));
      return;
    }
    resumed = call->request();
    call->Send(Tokens(" whole"), v1::FINISH_REASON_STOP);
    call->End(grpc::Status::OK);
  };
  auto a = Join("a", "unified", serve), b = Join("b", "unified", serve);
  const Reply reply = Generate(Prompt("go"));
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.text(), "half whole");
  EXPECT_EQ(resumed.prompt_length(), Tokens("go").size());
  EXPECT_EQ(static_cast<size_t>(resumed.token_ids_size()),
            Tokens("go").size() + Tokens("half").size());
}

TEST_F(RouterServerTest, WithoutMigrationAWorkerLostAfterTheFirstTokenEndsTheStream) {
  options_.core.migrate = false;
  StartRouter();
  std::unique_ptr<FakeWorker> worker;
  worker = Join("u", "unified", [&](Call call) { call->Send(Tokens("half")); });
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Prompt("go"));
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  EXPECT_EQ(message.finish_reason(), v1::FINISH_REASON_UNSPECIFIED);
  worker->Die();
  while (reader->Read(&message)) {
  }
  EXPECT_EQ(message.finish_reason(), v1::FINISH_REASON_ABORT);
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("decode worker 'u' was lost after"));
  Await([&] { return Cluster().workers_size() == 0; });
}

TEST_F(RouterServerTest, AFullWorkerIsTriedAgainWhenItReportsTheRoom) {
  StartRouter();
  std::atomic<int> calls{0};
  absl::Notification refused;
  auto worker = Join("u", "unified", [&](Call call) {
    if (calls++ == 0) {
      call->End(ToGrpcStatus(
          WithRefusal(ResourceExhausted("no blocks"), {Refusal::Reason::kBlocks, 20, 5})));
      refused.Notify();
      return;
    }
    call->Send(Tokens("ok"), v1::FINISH_REASON_LENGTH);
    call->End(grpc::Status::OK);
  });
  std::thread reporter([&] {
    refused.WaitForNotification();
    internal::v1::LoadReport load;
    load.set_admits_blocks(20);
    worker->cluster().PostLoad(load);
  });
  const Reply reply = Generate(Prompt("go"));
  reporter.join();
  EXPECT_TRUE(reply.status.ok()) << reply.status.error_message();
  EXPECT_EQ(reply.messages.back().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(calls, 2);
}

TEST_F(RouterServerTest, LinksBetweenWorkersThatAreThereAreShown) {
  StartRouter();
  auto prefill = Join("p", "prefill");
  auto decode = Join("d", "decode");
  internal::v1::LoadReport load;
  for (const char* peer : {"d", "gone"}) {
    internal::v1::LinkRate* link = load.add_links();
    link->set_peer_worker_id(peer);
    link->set_transport("tcp");
    link->set_bytes_per_second(2e9);
    link->set_least_bytes_per_second(3e9);
    link->set_slow(true);
    link->set_note("shm: the peer is on another host");
  }
  prefill->cluster().PostLoad(load);
  Await([&] { return Cluster().links_size() == 1; });
  const v1::Link link = Cluster().links(0);
  EXPECT_EQ(link.src() + " -> " + link.dst(), "p -> d");
  EXPECT_EQ(link.transport(), "tcp");
  EXPECT_EQ(link.bytes_per_second(), 2e9);
  EXPECT_EQ(link.state(), "slow");
  EXPECT_EQ(link.note(), "shm: the peer is on another host");
}

TEST_F(RouterServerTest, AFullQueueRefusesWithRetryInfoAndTheWaitingOneIsServed) {
  options_.core.dispatcher.max_queued_requests = 1;
  StartRouter();
  Reply first;
  std::thread client([&] { first = Generate(Prompt("go")); });
  Await([&] { return Cluster().queued_requests() == 1; });
  const Reply second = Generate(Prompt("go"));
  EXPECT_EQ(second.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(RetryAfter(FromGrpcStatus(second.status)).has_value());
  // What is refused for want of room was not even read.
  v1::GenerateRequest bad = Prompt("go");
  bad.mutable_sampling()->set_top_p(3);
  EXPECT_EQ(Generate(bad).status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  auto worker = Join("u", "unified", [&](Call call) {
    call->Send(Tokens("ok"), v1::FINISH_REASON_STOP);
    call->End(grpc::Status::OK);
  });
  client.join();
  EXPECT_TRUE(first.status.ok()) << first.status.error_message();
}

TEST_F(RouterServerTest, WithoutWorkersTheWaitIsShort) {
  options_.core.dispatcher.no_worker_timeout = absl::Milliseconds(20);
  StartRouter();
  const Reply reply = Generate(Prompt("go"));
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(reply.status.error_message(), HasSubstr("--no-worker-timeout"));
}

TEST_F(RouterServerTest, ClientCancelReachesTheWorker) {
  StartRouter();
  Call held;
  absl::Notification called;
  auto worker = Join("u", "unified", [&](Call call) {
    held = call;
    call->Send(Tokens("a"));
    called.Notify();
  });
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, Prompt("go"));
  v1::GenerateResponse message;
  ASSERT_TRUE(reader->Read(&message));
  called.WaitForNotification();
  context.TryCancel();
  held->AwaitCancel();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(RouterServerTest, TheRoutersOwnDeadlineEndsARequestWithoutOne) {
  options_.inference.request_timeout = absl::Milliseconds(200);
  StartRouter();
  Call held;
  absl::Notification called;
  auto worker = Join("u", "unified", [&](Call call) {
    held = call;
    called.Notify();
  });
  const Reply reply = Generate(Prompt("go"));
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  called.WaitForNotification();
  held->AwaitCancel();
}

TEST_F(RouterServerTest, AClientsDeadlineIsNoLongerThanTheRouters) {
  options_.inference.request_timeout = absl::Milliseconds(200);
  StartRouter();
  auto worker = Join("u", "unified", [](Call) {});
  grpc::ClientContext context;
  // So that a router which takes it over fails the test by what it says.
  const absl::Time patience = absl::Now() + absl::Seconds(15);
  context.set_deadline(absl::ToChronoTime(patience));
  const Reply reply = Generate(&context, Prompt("go"));
  EXPECT_EQ(reply.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_LT(absl::Now(), patience);
}

TEST_F(RouterServerTest, ThePublicPortHasThePublicServicesOnly) {
  StartRouter();
  grpc::ClientContext admin_context, join_context;
  join_context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(10)));
  v1::DrainWorkerRequest drain;
  v1::DrainWorkerResponse drained;
  EXPECT_EQ(v1::Admin::NewStub(channel_)->DrainWorker(&admin_context, drain, &drained).error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  const auto join = internal::v1::Cluster::NewStub(channel_)->Join(&join_context);
  EXPECT_EQ(join->Finish().error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(RouterServerTest, DetokenizeTakesNoMoreIdsThanAPromptMayHave) {
  options_.core.max_model_len = 8;
  StartRouter();
  const auto detokenize = [this](int ids) {
    grpc::ClientContext context;
    v1::DetokenizeRequest request;
    for (int i = 0; i < ids; ++i) request.add_ids(100);
    v1::DetokenizeResponse response;
    return stub_->Detokenize(&context, request, &response);
  };
  EXPECT_TRUE(detokenize(8).ok());
  const grpc::Status refused = detokenize(9);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused.error_message(), HasSubstr("at most max_model_len = 8 entries, got 9"));
}

// The worker is faster than the client: messages merge, but never beyond the bound.
TEST_F(RouterServerTest, ASlowClientGetsEverythingInBoundedMessages) {
  StartRouter();
  constexpr int kEvents = 200, kPerEvent = 10;
  const int32_t token = Tokens("a").front();
  auto worker = Join("u", "unified", [&](Call call) {
    for (int i = 0; i < kEvents; ++i) {
      call->Send(std::vector<int32_t>(kPerEvent, token + i % 2),
                 i + 1 == kEvents ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_UNSPECIFIED);
    }
    call->End(grpc::Status::OK);
  });
  v1::GenerateRequest request = Prompt("go");
  request.mutable_sampling()->set_max_tokens(kEvents * kPerEvent);
  grpc::ClientContext context;
  auto reader = stub_->Generate(&context, request);
  std::vector<int32_t> tokens;
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
    EXPECT_LT(message.token_ids_size(), static_cast<int>(PendingResponse::kMaxTokens) + kPerEvent);
    tokens.insert(tokens.end(), message.token_ids().begin(), message.token_ids().end());
  }
  EXPECT_TRUE(reader->Finish().ok());
  ASSERT_EQ(tokens.size(), static_cast<size_t>(kEvents * kPerEvent));
  for (size_t i = 0; i < tokens.size(); ++i) {
    ASSERT_EQ(tokens[i], token + static_cast<int32_t>(i / kPerEvent % 2)) << i;
  }
}

TEST_F(RouterServerTest, WhatAWorkerHasCachedDrawsTheRequest) {
  StartRouter();
  std::string prompt;
  for (int i = 0; i < 40; ++i) prompt += "number " + std::to_string(i) + " ";
  const std::vector<int32_t> tokens = Tokens(prompt);
  uint32_t predicted = 0;
  const auto serve = [&](Call call) {
    predicted = call->request().route().predicted_cached_tokens();
    call->Send(Tokens("ok"), v1::FINISH_REASON_STOP);
    call->End(grpc::Status::OK);
  };
  auto a = Join("a", "unified", serve);
  auto b = Join("b", "unified", serve);
  internal::v1::BlockEvents events;
  for (const Hash128& hash : HashTokenBlocks(BlockHashSeed("", "digest", ""), tokens, 16)) {
    events.add_stored(hash.ToBytes());
  }
  events.set_cleared(true);
  b->cluster().PostBlocks(events);
  const std::string expected = "b";
  // Events and reports go the same way, in order.
  Await([&] {
    const Reply reply = Generate(Prompt(prompt));
    return reply.status.ok() && reply.messages.back().timing().decode_worker() == expected &&
           predicted == tokens.size() / 16 * 16;
  });
}

TEST_F(RouterServerTest, HealthFollowsTheCluster) {
  StartRouter();
  auto health = grpc::health::v1::Health::NewStub(channel_);
  const auto serving = [&] {
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckResponse response;
    EXPECT_TRUE(health->Check(&context, {}, &response).ok());
    return response.status() == grpc::health::v1::HealthCheckResponse::SERVING;
  };
  EXPECT_FALSE(serving());
  auto decode = Join("d", "decode");
  EXPECT_FALSE(serving());
  auto prefill = Join("p", "prefill");
  Await(serving);

  grpc::ClientContext context;
  v1::DrainWorkerRequest drain;
  drain.set_worker_id("p");
  v1::DrainWorkerResponse response;
  EXPECT_TRUE(admin_->DrainWorker(&context, drain, &response).ok());
  prefill->AwaitDrain();
  Await([&] { return !serving(); });
  EXPECT_EQ(Cluster().workers(1).state(), "draining");
}

TEST_F(RouterServerTest, DrainLetsStreamsEndAndRefusesNewOnes) {
  StartRouter();
  Call held;
  absl::Notification called;
  auto worker = Join("u", "unified", [&](Call call) {
    held = call;
    call->Send(Tokens("a"));
    called.Notify();
  });
  Reply running;
  std::thread client([&] { running = Generate(Prompt("go")); });
  called.WaitForNotification();
  int cut = -1;
  std::thread drain([&] { cut = router_->Drain(absl::Seconds(20)); });
  Await([&] {
    const grpc::Status status = Generate(Prompt("")).status;
    return status.error_code() == grpc::StatusCode::UNAVAILABLE;
  });
  held->Send(Tokens("b"), v1::FINISH_REASON_STOP);
  held->End(grpc::Status::OK);
  client.join();
  drain.join();
  EXPECT_TRUE(running.status.ok()) << running.status.error_message();
  EXPECT_EQ(running.text(), "ab");
  EXPECT_EQ(cut, 0);
}

}  // namespace
}  // namespace tandem::router
