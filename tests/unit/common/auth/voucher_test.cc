#include "common/auth/voucher.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

constexpr char kDecode[] = "decode-0";
constexpr char kAddress[] = "10.0.0.2:50053";

absl::StatusCode CodeOf(const VoucherCheck& check, const std::string& key) {
  return check.Check(kDecode, kAddress, Vouch(key, kDecode, kAddress)).code();
}

TEST(VoucherCheck, TakesTheWordOfEachRouterAndOfNobodyElse) {
  VoucherCheck check;
  check.SetKey("a:1", VouchKeyFor("root of a", "prefill-0"));
  check.SetKey("b:1", VouchKeyFor("root of b", "prefill-0"));
  EXPECT_EQ(CodeOf(check, VouchKeyFor("root of a", "prefill-0")), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(check, VouchKeyFor("root of b", "prefill-0")), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(check, VouchKeyFor("root of a", "prefill-1")),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(CodeOf(check, VouchKeyFor("root of c", "prefill-0")),
            absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(CodeOf(check, ""), absl::StatusCode::kPermissionDenied);
  check.Forget("a:1");
  EXPECT_EQ(CodeOf(check, VouchKeyFor("root of a", "prefill-0")),
            absl::StatusCode::kPermissionDenied);
}

// A router may send a prompt before its answer to Hello is here, the first time and after it was
// started again; what it vouched for before that is good until then.
TEST(VoucherCheck, WhatOneRouterMayHaveVouchedForCanBeAskedAgain) {
  VoucherCheck check;
  EXPECT_EQ(CodeOf(check, "a"), absl::StatusCode::kUnavailable);
  check.Await("a:1");
  EXPECT_EQ(CodeOf(check, "a"), absl::StatusCode::kUnavailable);
  check.SetKey("a:1", "a");
  EXPECT_EQ(CodeOf(check, "a"), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(check, "b"), absl::StatusCode::kPermissionDenied);
  check.Await("b:1");
  EXPECT_EQ(CodeOf(check, "b"), absl::StatusCode::kUnavailable);
  EXPECT_EQ(CodeOf(check, "a"), absl::StatusCode::kOk);
  check.SetKey("b:1", "b");
  check.Await("a:1");
  EXPECT_EQ(CodeOf(check, "a"), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(check, "a again"), absl::StatusCode::kUnavailable);
  check.SetKey("a:1", "a again");
  EXPECT_EQ(CodeOf(check, "a again"), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOf(check, "a"), absl::StatusCode::kPermissionDenied);
}

// No key is one that anybody can make.
TEST(VoucherCheck, AnEmptyKeyVouchesForNothing) {
  VoucherCheck check;
  check.SetKey("a:1", "");
  EXPECT_EQ(CodeOf(check, ""), absl::StatusCode::kPermissionDenied);
}

}  // namespace
}  // namespace tandem
