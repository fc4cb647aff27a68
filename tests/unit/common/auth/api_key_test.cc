#include "common/auth/api_key.h"

#include <algorithm>
#include <cctype>
#include <set>
#include <string>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace tandem {
namespace {

TEST(ApiKeyTest, KeysAreLongRandomAndNeedNoQuotes) {
  std::set<std::string> keys;
  for (int i = 0; i < 100; ++i) {
    const std::string key = NewApiKey();
    EXPECT_EQ(key.size(), 47u) << "4 characters and 256 bits, 6 in each";
    EXPECT_TRUE(key.starts_with("tdm-"));
    EXPECT_TRUE(std::all_of(key.begin(), key.end(), [](char c) {
      return c == '-' || c == '_' || std::isalnum(c);
    })) << key;
    keys.insert(key);
  }
  EXPECT_EQ(keys.size(), 100u);
}

TEST(ApiKeyTest, TheDigestIsSha256) {
  EXPECT_EQ(absl::BytesToHexString(ApiKeyDigest("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(ApiKeyDigest("").size(), kApiKeyDigestBytes);
}

TEST(ApiKeyTest, NamesAreWhatLabelsAndLogsTake) {
  for (const char* good : {"a", "team-a", "A.b_9"}) EXPECT_TRUE(IsKeyName(good)) << good;
  for (const char* bad : {"", "a b", "a\n", "\x01", "a\"b", "\xC3\xA9"}) {
    EXPECT_FALSE(IsKeyName(bad)) << bad;
  }
  EXPECT_TRUE(IsKeyName(std::string(64, 'a')));
  EXPECT_FALSE(IsKeyName(std::string(65, 'a')));
}

}  // namespace
}  // namespace tandem
