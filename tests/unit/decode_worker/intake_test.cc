#include "decode_worker/intake.h"

#include <memory>
#include <set>
#include <string>
#include <thread>
#include <variant>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"

#include "common/rpc/status.h"
#include "decode_worker/decode_service.h"
#include "simulation/fake_clock.h"
#include "tests/support/paths.h"

namespace tandem::decode {
namespace {

using testing::HasSubstr;
using Request = internal::v1::DecodeRequest;

constexpr RequestLimits kLimits = {.vocab_size = 300, .max_model_len = 32};

Request ValidRequest() {
  Request request;
  request.set_request_id("r1");
  for (uint32_t i = 0; i < 10; ++i) request.add_token_ids(i);
  request.mutable_sampling()->set_max_tokens(4);
  return request;
}

TEST(DecodeWire, BadRequestsNameTheField) {
  const auto refused = [](const std::string& field, const std::function<void(Request*)>& change) {
    Request request = ValidRequest();
    change(&request);
    const absl::Status status = WorkFromProto(request, kLimits).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status.ToString();
    const auto violations = FieldViolations(status);
    EXPECT_FALSE(violations.empty()) << status.ToString();
    if (!violations.empty()) {
      EXPECT_THAT(violations[0].field, HasSubstr(field));
    }
    return std::string(status.message());
  };
  EXPECT_THAT(refused("token_ids", [](Request* r) { r->clear_token_ids(); }),
              HasSubstr("must not be empty"));
  EXPECT_THAT(refused("token_ids", [](Request* r) { r->set_token_ids(3, 300); }),
              HasSubstr("token_ids[3] is 300"));
  EXPECT_THAT(refused("token_ids",
                      [](Request* r) {
                        for (int i = 0; i < 22; ++i) r->add_token_ids(1);
                      }),
              HasSubstr("has 32 tokens; max_model_len 32 leaves room for a prompt of at most 31"));
  EXPECT_THAT(refused("sampling", [](Request* r) { r->mutable_sampling()->set_max_tokens(0); }),
              HasSubstr("max_tokens"));
}

TEST(DecodeWire, AMalformedAnswerIsThePrefillWorkersFault) {
  internal::v1::PrefillResponse response;
  response.mutable_first_token()->set_token_id(300);
  const absl::Status status = OutcomeFromProto(response, 300).status();
  EXPECT_TRUE(absl::IsInternal(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("first_token"));
}

// A prefill worker gets blocks that it was offered, at the address that the router named.
TEST(DecodeWire, OnlyWhatWasOfferedIsGivenBack) {
  PrefillCall call;
  call.call_id = 7;
  call.peer = {"p0", "p:1", "", "p:2"};
  call.first_block = 5;
  call.gives_back = true;
  internal::v1::KvTarget wanted;
  wanted.set_transfer_id(std::string(16, 't'));
  wanted.set_epoch(3);
  wanted.set_transport("tcp");
  wanted.set_address("elsewhere:1");
  wanted.set_worker_id("p1");
  wanted.set_num_blocks(10);
  wanted.set_first_block(2);
  for (const uint32_t id : {7, 8, 9}) wanted.add_block_ids(id);
  const auto read = WantedFromProto(wanted, call);
  ASSERT_OK(read);
  EXPECT_EQ(read->call_id, 7u);
  EXPECT_EQ(read->first_block, 2);
  EXPECT_EQ(read->target.address, "p:2");
  EXPECT_EQ(read->target.peer_worker_id, "p0");
  EXPECT_THAT(read->target.target_blocks, testing::ElementsAre(7, 8, 9));

  const auto message = [&](internal::v1::KvTarget changed, const PrefillCall& of) {
    const absl::Status status = WantedFromProto(changed, of).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status.ToString();
    return std::string(status.message());
  };
  internal::v1::KvTarget more = wanted;
  more.set_first_block(3);
  EXPECT_THAT(message(more, call), HasSubstr("wanted.block_ids must end before block 5"));
  more.set_first_block(4'294'967'295u);
  EXPECT_THAT(message(more, call), HasSubstr("wanted.block_ids"));
  internal::v1::KvTarget outside = wanted;
  outside.set_block_ids(1, 10);
  EXPECT_THAT(message(outside, call), HasSubstr("wanted.block_ids[1] is 10; the pool has 10"));
  internal::v1::KvTarget nameless = wanted;
  nameless.set_transfer_id("short");
  EXPECT_THAT(message(nameless, call), HasSubstr("wanted.transfer_id must have 16 bytes"));
  call.gives_back = false;
  EXPECT_THAT(message(wanted, call), HasSubstr("must end before block 0"));
}

TEST(Intake, WorkGetsGrowingIdsAndADeadlineOfTheLoopsClock) {
  FakeClock clock;
  EventInbox inbox(8);
  Intake intake(kLimits, &inbox, &clock);
  const auto first = intake.Read(ValidRequest(), absl::Seconds(5));
  const auto second = intake.Read(ValidRequest(), absl::InfiniteDuration());
  ASSERT_OK(first);
  ASSERT_OK(second);
  EXPECT_NE(first->id, 0u);
  EXPECT_GT(second->id, first->id);
  EXPECT_EQ(first->arrived, clock.Now());
  EXPECT_EQ(first->deadline, clock.Now() + absl::Seconds(5));
  EXPECT_EQ(second->deadline, absl::InfiniteFuture());
}

TEST(Intake, AFullOrClosedInboxRefusesWorkButNotCancellations) {
  FakeClock clock;
  EventInbox inbox(1);
  Intake intake(kLimits, &inbox, &clock);
  const auto push = [&] {
    return intake.Push(*intake.Read(ValidRequest(), absl::InfiniteDuration()),
                       intake.MakeStream(nullptr));
  };
  EXPECT_OK(push());
  EXPECT_TRUE(absl::IsResourceExhausted(push()));
  intake.Cancel(1);
  const auto events = inbox.Drain(absl::ZeroDuration());
  ASSERT_EQ(events.size(), 2u);
  EXPECT_TRUE(std::holds_alternative<WorkArrived>(events[0]));
  EXPECT_TRUE(std::holds_alternative<WorkCancelled>(events[1]));
  inbox.Close();
  EXPECT_TRUE(absl::IsUnavailable(push()));
}

// Notes which thread asks it: Read() does, on the thread that reads a request.
class NotingClock : public FakeClock {
 public:
  absl::Time Now() override {
    absl::MutexLock lock(&mutex_);
    last_ = std::this_thread::get_id();
    return FakeClock::Now();
  }
  std::thread::id last() {
    absl::MutexLock lock(&mutex_);
    return last_;
  }

 private:
  absl::Mutex mutex_;
  std::thread::id last_ ABSL_GUARDED_BY(mutex_);
};

// Streams' tokens are written in gRPC's threads.
TEST(DecodeService, LongPromptsAreNotReadInGrpcsThreads) {
  EventInbox inbox(16);
  NotingClock clock;
  Intake intake({.vocab_size = 300, .max_model_len = 1 << 20}, &inbox, &clock);
  DecodeService service(&intake);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  auto stub = internal::v1::Decode::NewStub(
      grpc::CreateChannel("127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials()));
  const auto reading_thread = [&](int tokens) {
    Request request = ValidRequest();
    for (int i = 10; i < tokens; ++i) request.add_token_ids(1);
    grpc::ClientContext context;
    const auto reader = stub->Generate(&context, request);
    std::thread::id thread;
    for (bool ended = false; !ended;) {
      for (Event& event : inbox.Drain(absl::Seconds(10))) {
        auto* arrived = std::get_if<WorkArrived>(&event);
        if (arrived == nullptr) continue;
        EXPECT_EQ(arrived->work.tokens.size(), static_cast<size_t>(tokens));
        thread = clock.last();
        if (arrived->stream->End(absl::OkStatus())) arrived->stream->Wake();
        ended = true;
      }
    }
    EXPECT_TRUE(reader->Finish().ok());
    return thread;
  };
  std::set<std::thread::id> of_short, of_long;
  for (int i = 0; i < 8; ++i) {
    of_short.insert(reading_thread(10));
    of_long.insert(reading_thread(131'072));
  }
  ASSERT_EQ(of_long.size(), 1u);
  EXPECT_FALSE(of_short.contains(*of_long.begin()));
  server->Shutdown();
}

}  // namespace
}  // namespace tandem::decode
