#include "router/keys/api_keys_file.h"

#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/auth/api_key.h"
#include "tests/support/paths.h"

namespace tandem::router {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

std::string Hex(const std::string& key) { return absl::BytesToHexString(ApiKeyDigest(key)); }

TEST(ApiKeysFileTest, ReadsAllFields) {
  const auto entries = ParseApiKeys("# who\n- name: team-a\n  sha256: " + Hex("one") +
                                    "\n  tenant: acme\n  requests_per_minute: 600\n"
                                    "  tokens_per_minute: 1e6\n  max_priority: -1\n"
                                    "- {name: b, sha256: [" +
                                    Hex("two") + ", " + Hex("three") + "]}\n");
  ASSERT_OK(entries);
  ASSERT_EQ(entries->size(), 2u);
  const ApiKeyEntry& a = entries->front();
  EXPECT_EQ(a.name, "team-a");
  EXPECT_THAT(a.digests, ElementsAre(ApiKeyDigest("one")));
  EXPECT_EQ(a.tenant, "acme");
  EXPECT_EQ(a.requests_per_minute, 600);
  EXPECT_EQ(a.tokens_per_minute, 1e6);
  EXPECT_EQ(a.max_priority, -1);
  const ApiKeyEntry& b = entries->back();
  EXPECT_THAT(b.digests, ElementsAre(ApiKeyDigest("two"), ApiKeyDigest("three")));
  EXPECT_EQ(b.tenant, "");
  EXPECT_EQ(b.requests_per_minute, 0);
  EXPECT_EQ(b.tokens_per_minute, 0);
  EXPECT_EQ(b.max_priority, std::nullopt);
}

TEST(ApiKeysFileTest, JsonIsReadToo) {
  const auto entries =
      ParseApiKeys(R"([{"name": "a", "sha256": ")" + Hex("k") + R"(", "requests_per_minute": 5}])");
  ASSERT_OK(entries);
  EXPECT_EQ(entries->front().requests_per_minute, 5);
}

TEST(ApiKeysFileTest, EveryMistakeIsNamedWithItsLine) {
  const std::string good = "- name: a\n  sha256: " + Hex("k") + "\n";
  const struct {
    std::string text;
    std::string message;
  } cases[] = {
      {"", "must be a list"},
      {"[]", "1 to 10000 entries"},
      {"name: a", "must be a list"},
      {"- just text", "line 1: an entry must have fields"},
      {"- sha256: " + Hex("k"), "line 1: the entry has no name"},
      {"- name: a", "line 1: a has no sha256"},
      {"- name: a\n  sha256: []", "a has no sha256"},
      {"- name: a b\n", "line 1: name must be 1 to 64 letters"},
      {"- name: " + std::string(65, 'a'), "name must be"},
      {"- name: {}", "name must be"},
      {"- name: a\n  sha256: tdm-not-a-digest", "line 2: sha256 must be 64 hex digits"},
      {good + "  tenant: a/b", "line 3: tenant must be"},
      {good + "  requests_per_minute: 0", "line 3: requests_per_minute must be a number above 0"},
      {good + "  tokens_per_minute: .inf", "tokens_per_minute must be"},
      {good + "  tokens_per_minute: .nan", "tokens_per_minute must be"},
      {good + "  tokens_per_minute: many", "tokens_per_minute must be"},
      {good + "  max_priority: 1.5", "max_priority must be a whole number"},
      {good + "  max_priority: -2000000", "max_priority must be a whole number"},
      {good + "  request_per_minute: 5", "did you mean requests_per_minute?"},
      {good + "  name: a", "line 3: name stands there twice"},
      {good + good, "line 3: a stands there twice"},
      {good + "- name: b\n  sha256: " + Hex("k"), "a sha256 of b stands there twice"},
      {"- name: [", "line "},
      {"\t- name: a", "line "},
  };
  for (const auto& bad : cases) {
    const auto entries = ParseApiKeys(bad.text);
    ASSERT_FALSE(entries.ok()) << bad.text;
    EXPECT_EQ(entries.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(entries.status().message()), HasSubstr(bad.message)) << bad.text;
  }
}

TEST(ApiKeysFileTest, AKeyPutInsteadOfItsDigestIsNotRepeated) {
  const auto entries = ParseApiKeys("- name: a\n  sha256: tdm-secret\n");
  ASSERT_FALSE(entries.ok());
  EXPECT_THAT(std::string(entries.status().message()), Not(HasSubstr("tdm-secret")));
}

}  // namespace
}  // namespace tandem::router
