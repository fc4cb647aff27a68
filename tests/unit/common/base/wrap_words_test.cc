#include "common/base/wrap_words.h"

#include "gtest/gtest.h"

namespace tandem {
namespace {

TEST(WrapWords, LinesEndBetweenWords) {
  EXPECT_EQ(WrapWords("", 10, 2), "");
  EXPECT_EQ(WrapWords("one two  three", 14, 2), "one two three");
  EXPECT_EQ(WrapWords("one two three", 7, 0), "one two\nthree");
  EXPECT_EQ(WrapWords("one two three", 8, 2), "one two\n  three");
  EXPECT_EQ(WrapWords("one\ntwo", 8, 2), "one two");
}

TEST(WrapWords, ALongWordIsNotCut) {
  EXPECT_EQ(WrapWords("a verylongword b", 6, 1), "a\n verylongword\n b");
  EXPECT_EQ(WrapWords("verylongword", 6, 1), "verylongword");
}

TEST(WrapWords, TheFirstLineMayBeginFurtherRight) {
  EXPECT_EQ(WrapWords("one two", 12, 4, 4), "one two");
  EXPECT_EQ(WrapWords("one two", 12, 4, 6), "one\n    two");
}

TEST(WrapWords, CharactersAreCountedNotBytes) {
  EXPECT_EQ(WrapWords("größe größe", 11, 0), "größe größe");
}

}  // namespace
}  // namespace tandem
