#include "router/keys/key_ring.h"

#include <memory>
#include <string>
#include <unistd.h>

#include "absl/strings/escaping.h"
#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/auth/api_key.h"
#include "common/rpc/status.h"
#include "simulation/fake_clock.h"
#include "tests/support/paths.h"
#include "tests/support/temp_dir.h"

namespace tandem::router {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class KeyRingTest : public ::testing::Test {
 protected:
  static std::string Entry(const std::string& name, const std::string& key,
                           const std::string& more = "") {
    return fmt::format("- {{name: {}, sha256: {}{}}}\n", name,
                       absl::BytesToHexString(ApiKeyDigest(key)), more);
  }
  void Write(const std::string& text) { WriteFile(path_, text); }
  void Open(const std::string& text) {
    Write(text);
    auto ring = KeyRing::Open(path_, &metrics_, &clock_);
    ASSERT_OK(ring);
    ring_ = *std::move(ring);
  }
  absl::StatusCode Ask(const std::string& authorization) {
    return ring_->Admit(authorization).status().code();
  }

  TempDir dir_;
  const std::string path_ = dir_.path() + "/keys.yaml";
  FakeClock clock_;
  Metrics metrics_;
  std::unique_ptr<KeyRing> ring_;
};

TEST_F(KeyRingTest, LetsInWhoHasAKey) {
  ASSERT_NO_FATAL_FAILURE(Open(Entry("a", "tdm-one", ", tenant: t") + Entry("b", "tdm-two")));
  const auto a = ring_->Admit("Bearer tdm-one");
  ASSERT_OK(a);
  EXPECT_EQ((*a)->entry.name, "a");
  EXPECT_EQ((*a)->entry.tenant, "t");
  EXPECT_EQ(Ask("bearer tdm-two"), absl::StatusCode::kOk);
  EXPECT_THAT(metrics_.Render(), HasSubstr("tandem_api_key_requests_total{key=\"a\"} 1"));
}

TEST_F(KeyRingTest, TurnsAwayWhoHasNone) {
  ASSERT_NO_FATAL_FAILURE(Open(Entry("a", "tdm-one")));
  for (const char* authorization :
       {"", "Bearer", "Bearer ", "tdm-one", "Basic tdm-one", "Bearer tdm-On", "Bearer tdm-one ",
        "Bearer  tdm-one", "Bearer tdm-onetdm-one"}) {
    const auto refused = ring_->Admit(authorization);
    EXPECT_EQ(refused.status().code(), absl::StatusCode::kUnauthenticated) << authorization;
    EXPECT_THAT(std::string(refused.status().message()), Not(HasSubstr("tdm-")));
  }
  // Nor does the digest itself open anything.
  EXPECT_EQ(Ask("Bearer " + absl::BytesToHexString(ApiKeyDigest("tdm-one"))),
            absl::StatusCode::kUnauthenticated);
}

TEST_F(KeyRingTest, TooManyRequestsAreToldWhenToComeAgain) {
  ASSERT_NO_FATAL_FAILURE(Open(Entry("a", "one", ", requests_per_minute: 2") + Entry("b", "two")));
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kOk);
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kOk);
  const absl::Status refused = ring_->Admit("Bearer one").status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("'a' is over its 2 requests per minute"));
  EXPECT_EQ(RetryAfter(refused), absl::Seconds(30));
  EXPECT_EQ(Ask("Bearer two"), absl::StatusCode::kOk) << "others are not held up";
  clock_.Advance(absl::Seconds(30));
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kOk);
  EXPECT_THAT(metrics_.Render(),
              HasSubstr("tandem_api_key_refused_total{key=\"a\",reason=\"requests\"} 1"));
}

TEST_F(KeyRingTest, TokensAreOwedOnceTheyAreKnown) {
  ASSERT_NO_FATAL_FAILURE(Open(Entry("a", "one", ", tokens_per_minute: 100")));
  const auto holder = ring_->Admit("Bearer one");
  ASSERT_OK(holder);
  (*holder)->allowance->TakeTokens(150, clock_.Now());
  const absl::Status refused = ring_->Admit("Bearer one").status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("100 tokens per minute"));
  EXPECT_EQ(RetryAfter(refused), absl::Minutes(0.51));
  clock_.Advance(absl::Minutes(0.51));
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kOk);
  EXPECT_THAT(metrics_.Render(), HasSubstr("tandem_api_key_tokens_total{key=\"a\"} 150"));
}

TEST_F(KeyRingTest, AKeyIsReplacedWithoutAGap) {
  ASSERT_NO_FATAL_FAILURE(Open(Entry("a", "old")));
  const std::string both =
      fmt::format("- {{name: a, sha256: [{}, {}]}}\n", absl::BytesToHexString(ApiKeyDigest("old")),
                  absl::BytesToHexString(ApiKeyDigest("new")));
  Write(both);
  ASSERT_OK(ring_->Reload());
  EXPECT_EQ(Ask("Bearer old"), absl::StatusCode::kOk);
  EXPECT_EQ(Ask("Bearer new"), absl::StatusCode::kOk);
  Write(Entry("a", "new"));
  ASSERT_OK(ring_->Reload());
  EXPECT_EQ(Ask("Bearer old"), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(Ask("Bearer new"), absl::StatusCode::kOk);
}

TEST_F(KeyRingTest, ANewFileIsNoNewMinute) {
  ASSERT_NO_FATAL_FAILURE(Open(Entry("a", "one", ", requests_per_minute: 1")));
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kOk);
  Write(Entry("b", "two"));
  ASSERT_OK(ring_->Reload());
  Write(Entry("a", "another", ", requests_per_minute: 1"));
  ASSERT_OK(ring_->Reload());
  EXPECT_EQ(Ask("Bearer another"), absl::StatusCode::kResourceExhausted);
}

TEST_F(KeyRingTest, AFileThatCannotBeUsedChangesNothing) {
  ASSERT_NO_FATAL_FAILURE(Open(Entry("a", "one")));
  const auto broken = [this] {
    return metrics_.Render().find("\ntandem_api_keys_file_broken 1") != std::string::npos;
  };
  EXPECT_FALSE(broken());
  Write("- name: a\n");
  const absl::Status status = ring_->Reload();
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr(path_ + ": line 1: a has no sha256"));
  EXPECT_TRUE(broken());
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kOk);
  ASSERT_EQ(unlink(path_.c_str()), 0);
  EXPECT_FALSE(ring_->Reload().ok());
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kOk);
  Write(Entry("b", "two"));
  EXPECT_OK(ring_->Reload());
  EXPECT_FALSE(broken());
  EXPECT_EQ(Ask("Bearer one"), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(Ask("Bearer two"), absl::StatusCode::kOk);
}

TEST_F(KeyRingTest, StartsWithAGoodFileOnly) {
  const auto missing = KeyRing::Open(dir_.path() + "/nothing", &metrics_, &clock_);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr("--api-keys-file"));
  Write("{}");
  EXPECT_FALSE(KeyRing::Open(path_, &metrics_, &clock_).ok());
}

}  // namespace
}  // namespace tandem::router
