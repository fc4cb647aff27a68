#include "common/text/utf8.h"

#include "gtest/gtest.h"

namespace tandem {
namespace {

std::string Lossy(std::string_view bytes) {
  std::string out;
  EXPECT_EQ(AppendLossyUtf8(bytes, /*final=*/true, &out), bytes.size());
  return out;
}

TEST(Utf8Test, FindsTheFirstInvalidByte) {
  EXPECT_EQ(FindInvalidUtf8(""), std::nullopt);
  EXPECT_EQ(FindInvalidUtf8("a\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80"), std::nullopt);
  EXPECT_EQ(FindInvalidUtf8("\xF4\x8F\xBF\xBF"), std::nullopt);  // U+10FFFF
  EXPECT_EQ(FindInvalidUtf8("abc\x80"), 3u);                     // lone continuation
  EXPECT_EQ(FindInvalidUtf8("a\xC3"), 1u);                       // cut off
  EXPECT_EQ(FindInvalidUtf8("\xC0\x80"), 0u);                    // overlong
  EXPECT_EQ(FindInvalidUtf8("\xE0\x9F\xBF"), 0u);                // overlong
  EXPECT_EQ(FindInvalidUtf8("\xED\xA0\x80"), 0u);                // surrogate
  EXPECT_EQ(FindInvalidUtf8("\xF4\x90\x80\x80"), 0u);            // above U+10FFFF
}

TEST(Utf8Test, LossyReadingReplacesMaximalSubparts) {
  // The examples of Unicode 15, tables 3-8 to 3-11.
  EXPECT_EQ(Lossy("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(Lossy("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDA");
  EXPECT_EQ(Lossy("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), "\uFFFD\uFFFD\uFFFD\uFFFDA");
}

TEST(Utf8Test, LossyReadingStopsBeforeAnIncompleteCharacter) {
  std::string out;
  EXPECT_EQ(AppendLossyUtf8("a\xE4\xB8", /*final=*/false, &out), 1u);
  EXPECT_EQ(out, "a");
  // Can no longer become a character: replaced at once.
  out.clear();
  EXPECT_EQ(AppendLossyUtf8("a\xE4\x41", /*final=*/false, &out), 3u);
  EXPECT_EQ(out, "a\uFFFDA");
}

TEST(Utf8Test, CodePointsGoThereAndBack) {
  for (const uint32_t c :
       {0u, 0x7Fu, 0x80u, 0x7FFu, 0x800u, 0xFFFDu, 0xFFFFu, 0x10000u, 0x10FFFFu}) {
    std::string bytes;
    AppendCodePoint(c, &bytes);
    EXPECT_EQ(FindInvalidUtf8(bytes), std::nullopt);
    size_t pos = 0;
    EXPECT_EQ(NextCodePoint(bytes, &pos), c);
    EXPECT_EQ(pos, bytes.size());
  }
}

}  // namespace
}  // namespace tandem
