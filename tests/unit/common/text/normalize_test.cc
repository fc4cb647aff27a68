#include "common/text/normalize.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

std::string Normalized(std::string_view text) {
  auto once = NormalizePrompt(text);
  EXPECT_OK(once);
  auto twice = NormalizePrompt(*once);
  EXPECT_EQ(*once, *twice) << "not idempotent";
  return *once;
}

TEST(NormalizePromptTest, LineEnds) {
  EXPECT_EQ(Normalized("a\r\nb\rc\n\r\nd\r\r\n"), "a\nb\nc\n\nd\n\n");
}

TEST(NormalizePromptTest, TrailingBlanks) {
  EXPECT_EQ(Normalized("a  \n\t b \t\r\n  \n c\t "), "a\n\t b\n\n c");
  EXPECT_EQ(Normalized("   "), "");
  EXPECT_EQ(Normalized(""), "");
  EXPECT_EQ(Normalized(" a\u00A0\n"), " a\u00A0\n") << "only space and tab are blanks";
}

TEST(NormalizePromptTest, Nfc) { EXPECT_EQ(Normalized("cafe\u0301 \r\n"), "caf\u00E9\n"); }

TEST(NormalizePromptTest, RefusesInvalidUtf8) {
  const auto status = NormalizePrompt("ab\xFF").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("byte 2"));
}

}  // namespace
}  // namespace tandem
