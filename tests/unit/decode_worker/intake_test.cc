#include "decode_worker/intake.h"

#include <string>
#include <variant>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/rpc/status.h"
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

}  // namespace
}  // namespace tandem::decode
