#include "prefill_worker/prefill_service.h"

#include <atomic>
#include <functional>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/work_pool.h"
#include "common/rpc/server.h"
#include "tests/support/paths.h"
#include "tests/unit/prefill_worker/loop_harness.h"

namespace tandem::prefill {
namespace {

using testing::HasSubstr;
using Request = internal::v1::PrefillRequest;

constexpr char kVouchKey[] = "key";
constexpr char kCapability[] = "a0b1c2";

RequestLimits Options() {
  return {.worker_id = "p0",
          .capability_digest = kCapability,
          .vocab_size = 1000,
          .max_model_len = 100,
          .block_size = 16,
          .num_blocks = 64};
}

Request ValidRequest(uint64_t transfer = 1) {
  Request request;
  request.set_request_id("r1");
  for (uint32_t i = 0; i < 40; ++i) request.add_token_ids(i);
  request.mutable_sampling()->set_max_tokens(4);
  request.mutable_sampling()->set_temperature(0);
  request.set_capability_digest(kCapability);
  internal::v1::KvTarget& target = *request.mutable_target();
  target.set_transfer_id(TransferId{{1, transfer}}.ToBytes());
  target.set_transport("tcp");
  target.set_address("127.0.0.1:1");
  target.set_worker_id("d0");
  target.set_voucher(Vouch(kVouchKey, "d0", "127.0.0.1:1"));
  target.set_num_blocks(1024);
  target.set_first_block(1);
  target.add_block_ids(7);
  target.add_block_ids(8);
  return request;
}

absl::Status ErrorOf(const std::function<void(Request*)>& change) {
  Request request = ValidRequest();
  change(&request);
  return WorkFromProto(request, Options()).status();
}

TEST(PrefillService, ReadsTheRequest) {
  Request request = ValidRequest();
  request.set_priority(3);
  request.set_cache_salt("salt");
  request.mutable_target()->set_epoch(9);
  const absl::StatusOr<Work> work = WorkFromProto(request, Options());
  ASSERT_OK(work);
  EXPECT_EQ(work->tokens.size(), 40u);
  EXPECT_EQ(work->priority, 3);
  EXPECT_EQ(work->cache_salt, "salt");
  EXPECT_EQ(work->first_block, 1);
  EXPECT_EQ(work->target.epoch, 9u);
  EXPECT_EQ(work->target.peer_worker_id, "d0");
  EXPECT_THAT(work->target.target_blocks, testing::ElementsAre(7, 8));
}

TEST(PrefillService, BadRequestsNameTheField) {
  const auto message = [](const std::function<void(Request*)>& change) {
    const absl::Status status = ErrorOf(change);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_THAT(message([](Request* r) { r->clear_token_ids(); }),
              HasSubstr("token_ids must not be empty"));
  EXPECT_THAT(message([](Request* r) {
                for (int i = 0; i < 61; ++i) r->add_token_ids(1);
              }),
              HasSubstr("token_ids holds 101 tokens; max_model_len is 100"));
  EXPECT_THAT(message([](Request* r) { r->set_token_ids(5, 1000); }), HasSubstr("token_ids[5]"));
  EXPECT_THAT(message([](Request* r) { r->mutable_sampling()->set_top_p(-1); }),
              HasSubstr("sampling.top_p"));
  EXPECT_THAT(message([](Request* r) { r->mutable_target()->set_transfer_id("short"); }),
              HasSubstr("target.transfer_id must have 16 bytes, got 5"));
  EXPECT_THAT(message([](Request* r) { r->mutable_target()->clear_transport(); }),
              HasSubstr("target.transport"));
  EXPECT_THAT(message([](Request* r) { r->mutable_target()->clear_address(); }),
              HasSubstr("target.address"));
  EXPECT_THAT(message([](Request* r) { r->mutable_target()->add_block_ids(9); }),
              HasSubstr("target.block_ids"));
  EXPECT_THAT(message([](Request* r) { r->mutable_target()->set_first_block(4'000'000'000u); }),
              HasSubstr("target.block_ids"));
  EXPECT_THAT(message([](Request* r) { r->mutable_target()->set_block_ids(1, 1024); }),
              HasSubstr("target.block_ids[1] is 1024; the pool has 1024 blocks"));
}

TEST(PrefillService, AnotherCapabilityIsRefusedWithOneLine) {
  const absl::Status status = ErrorOf([](Request* r) { r->set_capability_digest("other"); });
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("capability_digest of the caller and of prefill worker p0 differ"));
  EXPECT_THAT(std::string(status.message()), testing::Not(HasSubstr(kCapability)));
}

// The service over loopback, with the loop on this thread.
class PrefillServiceRpc : public testing::Test {
 protected:
  void SetUp() override {
    vouchers_.SetKey("r0", kVouchKey);
    auto server = RpcServer::Start({}, {&service_});
    ASSERT_OK(server);
    server_ = *std::move(server);
    stub_ = internal::v1::Prefill::NewStub(MakeChannel(server_->address()));
  }
  void TearDown() override {
    h_.loop.reset();  // answers what is left
    server_->Shutdown(absl::Seconds(5));
  }

  struct Call final : grpc::ClientReadReactor<internal::v1::PrefillEvent> {
    void OnReadDone(bool ok) override {
      if (!ok) return;
      if (event.has_wanted()) wanted.push_back(event.wanted());
      if (event.has_computed_tokens()) progress.push_back(event.computed_tokens());
      if (event.has_done()) response = event.done();
      if (on_event) on_event();
      StartRead(&event);
    }
    void OnDone(const grpc::Status& how) override {
      status = how;
      done.Notify();
    }

    grpc::ClientContext context;
    Request request;
    internal::v1::PrefillEvent event;
    std::function<void()> on_event;
    // To be read once it is done.
    std::vector<internal::v1::KvTarget> wanted;
    std::vector<uint32_t> progress;
    internal::v1::PrefillResponse response;
    grpc::Status status;
    absl::Notification done;
  };
  void StartCall(Call* call) {
    stub_->async()->Prefill(&call->context, &call->request, call);
    call->StartRead(&call->event);
    call->StartCall();
  }
  // The loop's turns, until `call` has its answer.
  void TurnUntilDone(Call* call) {
    while (!call->done.HasBeenNotified()) h_.loop->Step(absl::Milliseconds(5));
  }

  LoopHarness h_;
  Intake intake_{Options(), &h_.inbox, &h_.clock};
  VoucherCheck vouchers_;
  WorkPool writers_{1, 16};
  PrefillService service_{&intake_, &vouchers_, &writers_};
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<internal::v1::Prefill::Stub> stub_;
};

TEST_F(PrefillServiceRpc, Answers) {
  Call call;
  call.request = ValidRequest();
  call.request.mutable_sampling()->set_logprobs(2);
  StartCall(&call);
  TurnUntilDone(&call);
  ASSERT_TRUE(call.status.ok()) << call.status.error_message();
  EXPECT_EQ(call.response.worker_id(), "p0");
  EXPECT_EQ(call.response.first_token().top_size(), 2);
  EXPECT_EQ(call.response.kv_bytes(), 2 * h_.engine.memory.region().layout.BlockBytes());
  engine::SamplingParams greedy;
  greedy.temperature = 0;
  const std::vector<int32_t> prompt(call.request.token_ids().begin(),
                                    call.request.token_ids().end());
  EXPECT_EQ(call.response.first_token().token_id(),
            static_cast<uint32_t>(engine::FakeReferenceTokens(prompt, greedy, 1 << 20)[0]));
}

// The loop waits in front of each chunk until the caller has heard of the one before.
TEST_F(PrefillServiceRpc, TellsHowFarThePromptIsWhereAsked) {
  Call call, silent;
  call.request = ValidRequest(1);
  silent.request = ValidRequest(2);
  silent.request.set_cache_salt("other");
  for (uint32_t i = 0; i < 55; ++i) {  // 95 tokens: two chunks
    call.request.add_token_ids(i);
    silent.request.add_token_ids(i);
  }
  for (Call* each : {&call, &silent}) {
    for (uint32_t block = 9; block < 12; ++block) {
      each->request.mutable_target()->add_block_ids(block);
    }
  }
  call.request.set_progress(true);
  std::atomic<int> heard = 0;
  call.on_event = [&] { ++heard; };
  int chunk = 0;
  h_.before_run = [&](const engine::Batch&) {
    ++chunk;
    while (heard < chunk && !call.done.HasBeenNotified()) absl::SleepFor(absl::Milliseconds(1));
    return absl::OkStatus();
  };
  StartCall(&call);
  TurnUntilDone(&call);
  ASSERT_TRUE(call.status.ok()) << call.status.error_message();
  EXPECT_THAT(call.progress, testing::ElementsAre(0, 64));
  EXPECT_TRUE(call.response.has_first_token());
  h_.before_run = nullptr;
  StartCall(&silent);
  TurnUntilDone(&silent);
  ASSERT_TRUE(silent.status.ok()) << silent.status.error_message();
  EXPECT_THAT(silent.progress, testing::IsEmpty());
}

// The logprobs of a long prompt are a message of many milliseconds: other prompts need not wait for
// it.
TEST_F(PrefillServiceRpc, LongAnswersAreNotWrittenByTheLoop) {
  absl::Notification may_write;
  ASSERT_TRUE(writers_.TryRun([&] { may_write.WaitForNotification(); }));
  Call long_one, short_one;
  long_one.request = ValidRequest(1);
  long_one.request.mutable_sampling()->set_prompt_logprobs(2);
  short_one.request = ValidRequest(2);
  StartCall(&long_one);
  while (h_.worker_metrics.requests_finished.Value() < 1) h_.loop->Step(absl::Milliseconds(5));
  StartCall(&short_one);
  TurnUntilDone(&short_one);
  EXPECT_FALSE(long_one.done.HasBeenNotified());
  may_write.Notify();
  long_one.done.WaitForNotification();
  ASSERT_TRUE(long_one.status.ok()) << long_one.status.error_message();
  EXPECT_EQ(long_one.response.prompt_logprobs_size(), 39);
}

TEST_F(PrefillServiceRpc, BadRequestIsAnsweredWithoutTheLoop) {
  Call call;
  call.request = ValidRequest();
  call.request.clear_token_ids();
  StartCall(&call);
  call.done.WaitForNotification();
  EXPECT_EQ(call.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

// Whoever the caller has proved to be: blocks go where the router says that its pool is.
TEST_F(PrefillServiceRpc, ShipsOnlyWhereTheRouterVouchesFor) {
  const auto code_of = [this](const std::function<void(internal::v1::KvTarget*)>& change) {
    Call call;
    call.request = ValidRequest();
    change(call.request.mutable_target());
    StartCall(&call);
    if (!call.done.WaitForNotificationWithTimeout(absl::Seconds(20))) {
      call.context.TryCancel();  // it was taken, and nobody runs the loop
      call.done.WaitForNotification();
    }
    return call.status.error_code();
  };
  using Target = internal::v1::KvTarget;
  EXPECT_EQ(code_of([](Target* t) { t->set_address("127.0.0.1:22"); }),
            grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(code_of([](Target* t) { t->set_worker_id("d1"); }),
            grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(code_of([](Target* t) { t->clear_voucher(); }), grpc::StatusCode::PERMISSION_DENIED);
  // By another router, or for another prefill worker.
  EXPECT_EQ(code_of([](Target* t) { t->set_voucher(Vouch("other", "d0", "127.0.0.1:1")); }),
            grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_FALSE(h_.loop->Step(absl::ZeroDuration()));  // none reached the loop
  // Before the router has said anything: ask again.
  vouchers_.Forget("r0");
  EXPECT_EQ(code_of([](Target*) {}), grpc::StatusCode::RESOURCE_EXHAUSTED);
}

// Over the call itself, before its answer.
TEST_F(PrefillServiceRpc, AsksTheCallerForWhatItHolds) {
  Call call;
  call.request = ValidRequest();
  call.request.set_gives_back(true);
  StartCall(&call);
  while (h_.receiver.expected.empty()) h_.loop->Step(absl::Milliseconds(5));
  const auto& [key, blocks] = *h_.receiver.expected.begin();
  Wanted wanted;
  wanted.target.epoch = key.second;
  wanted.target.id = h_.receiver.last_id;
  wanted.target.target_blocks = blocks;
  const std::vector<int32_t> prompt(call.request.token_ids().begin(),
                                    call.request.token_ids().end());
  h_.GiveBack(wanted, prompt);
  h_.receiver.Seal(wanted, 1);
  h_.receiver.Quiet(wanted);
  TurnUntilDone(&call);
  ASSERT_TRUE(call.status.ok()) << call.status.error_message();
  ASSERT_EQ(call.wanted.size(), 1u);
  EXPECT_EQ(call.wanted[0].transfer_id(), h_.receiver.last_id.ToBytes());
  EXPECT_EQ(call.wanted[0].first_block(), 0u);
  EXPECT_EQ(call.wanted[0].block_ids_size(), 1);
  EXPECT_EQ(call.wanted[0].token(), "token");
  EXPECT_EQ(call.wanted[0].num_blocks(), 64u);
  EXPECT_EQ(call.response.cached_tokens(), 16u);
  EXPECT_EQ(call.response.returned_tokens(), 16u);
}

TEST_F(PrefillServiceRpc, CancelledCallIsForgotten) {
  bool arrived = false;
  Call call;
  call.request = ValidRequest();
  h_.before_run = [&](const engine::Batch&) {
    arrived = true;
    call.context.TryCancel();
    return absl::InternalError("never mind");
  };
  StartCall(&call);
  TurnUntilDone(&call);
  EXPECT_TRUE(arrived);
  EXPECT_FALSE(call.status.ok());
  h_.RunToEnd();
  h_.ExpectNothingHeld();
}

TEST_F(PrefillServiceRpc, DeadlineEndsAWaitingPrompt) {
  h_.sender.complete_at_once = false;
  absl::StatusOr<engine::BlockLease> all = h_.pool.Reserve(64);  // nothing can be admitted
  ASSERT_OK(all);
  Call call;
  call.request = ValidRequest();
  call.context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  StartCall(&call);
  TurnUntilDone(&call);
  EXPECT_EQ(call.status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  while (h_.loop->Load().waiting > 0) h_.loop->Step(absl::Milliseconds(5));
  EXPECT_EQ(h_.worker_metrics.requests_cancelled.Value(), 1);
}

}  // namespace
}  // namespace tandem::prefill
