#include "common/rpc/status.h"

#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"

namespace tandem {
namespace {

TEST(RpcStatusTest, FieldsAndRetrySurviveTheWire) {
  absl::Status status = absl::InvalidArgumentError("temperature must be >= 0, got -1");
  status = WithField(std::move(status), "sampling.temperature");
  status = WithField(std::move(status), "sampling.top_p");
  status = WithRetryAfter(std::move(status), absl::Milliseconds(1500));
  const grpc::Status wire = ToGrpcStatus(status);
  EXPECT_EQ(wire.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(wire.error_message(), "temperature must be >= 0, got -1");
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(wire.error_details()));
  EXPECT_EQ(details.code(), 3);
  EXPECT_EQ(details.message(), wire.error_message());
  EXPECT_EQ(details.details_size(), 2);

  const absl::Status back = FromGrpcStatus(wire);
  EXPECT_EQ(back.code(), absl::StatusCode::kInvalidArgument);
  const std::vector<FieldViolation> fields = FieldViolations(back);
  ASSERT_EQ(fields.size(), 2u);
  EXPECT_EQ(fields[0].field, "sampling.temperature");
  EXPECT_EQ(fields[0].description, "temperature must be >= 0, got -1");
  EXPECT_EQ(fields[1].field, "sampling.top_p");
  EXPECT_EQ(RetryAfter(back), absl::Milliseconds(1500));
}

TEST(RpcStatusTest, OkStaysOk) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
  EXPECT_TRUE(WithField(absl::OkStatus(), "x").ok());
  EXPECT_EQ(RetryAfter(absl::OkStatus()), std::nullopt);
}

TEST(RpcStatusTest, MessagesAreMadeValidUtf8AndBounded) {
  EXPECT_EQ(ToGrpcStatus(absl::InternalError("a\xff\xc0\xaf b\xe2\x82")).error_message(),
            "a??? b??");
  EXPECT_EQ(ToGrpcStatus(absl::InternalError("\xed\xa0\x80 \xf4\x90\x80\x80")).error_message(),
            "??? ????");
  const std::string good = "\xe2\x82\xac \xf0\x9f\x98\x80 \xc3\xa9";
  EXPECT_EQ(ToGrpcStatus(absl::InternalError(good)).error_message(), good);
  const grpc::Status big =
      ToGrpcStatus(WithField(absl::InvalidArgumentError(std::string(10'000'000, 'x')), "text"));
  EXPECT_LE(big.error_message().size(), 1003u);
  EXPECT_LE(big.error_details().size(), 3000u);
}

TEST(RpcStatusTest, ForeignDetailsThatDoNotParseAreLeftOut) {
  const absl::Status status =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::NOT_FOUND, "gone", "\xff\xff\xff"));
  EXPECT_EQ(status, absl::NotFoundError("gone"));
}

}  // namespace
}  // namespace tandem
