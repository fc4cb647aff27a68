#include "common/text/detokenizer.h"

#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/text/utf8.h"
#include "tests/unit/common/text/text_fixtures.h"

namespace tandem {
namespace {

std::vector<int32_t> Ids(std::string_view text) {
  std::vector<int32_t> ids;
  EXPECT_OK(FixtureTokenizer()->Encode(text, /*parse_special=*/true, &ids));
  return ids;
}

TEST(IncrementalDetokenizerTest, CharactersComeOutWhole) {
  IncrementalDetokenizer detokenizer(FixtureTokenizer(), false);
  const std::vector<int32_t> ids = Ids("\U0001F600");  // four byte tokens in this vocabulary
  ASSERT_EQ(ids.size(), 4u);
  EXPECT_EQ(detokenizer.Push(ids[0]), "");
  EXPECT_EQ(detokenizer.Push(ids[1]), "");
  EXPECT_EQ(detokenizer.Push(ids[2]), "");
  EXPECT_EQ(detokenizer.Push(ids[3]), "\U0001F600");
  EXPECT_EQ(detokenizer.Flush(), "");
}

TEST(IncrementalDetokenizerTest, BrokenCharactersAreReplacedAsSoonAsTheyAreLost) {
  IncrementalDetokenizer detokenizer(FixtureTokenizer(), false);
  const std::vector<int32_t> ids = Ids("\U0001F600a");
  ASSERT_EQ(ids.size(), 5u);
  EXPECT_EQ(detokenizer.Push(ids[0]), "");
  EXPECT_EQ(detokenizer.Push(ids[1]), "");
  EXPECT_EQ(detokenizer.Push(ids[4]), "\uFFFDa");
  EXPECT_EQ(detokenizer.Push(ids[2]), "\uFFFD");  // a lone continuation byte
  EXPECT_EQ(detokenizer.Push(ids[0]), "");
  EXPECT_EQ(detokenizer.Flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.Push(ids[4]), "a") << "usable again after Flush";
}

TEST(IncrementalDetokenizerTest, SpecialTokensAreSkippedOnRequest) {
  const std::vector<int32_t> ids = Ids("a<|im_end|>b<tool_call>");
  EXPECT_EQ(IncrementalDetokenizer(FixtureTokenizer(), true).Push(ids), "ab<tool_call>");
  EXPECT_EQ(IncrementalDetokenizer(FixtureTokenizer(), false).Push(ids), "a<|im_end|>b<tool_call>");
}

TEST(IncrementalDetokenizerTest, PartsJoinedEqualDecode) {
  const auto tokenizer = FixtureTokenizer();
  std::mt19937 random(5);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int32_t> ids(random() % 20);
    // Single bytes are the first 256 ids; many of them make many broken characters.
    for (int32_t& id : ids) id = static_cast<int32_t>(random() % (round % 2 == 0 ? 256 : 700));
    const bool skip = round % 3 == 0;
    IncrementalDetokenizer detokenizer(tokenizer, skip);
    std::string joined;
    for (const int32_t id : ids) {
      const std::string part = detokenizer.Push(id);
      EXPECT_EQ(FindInvalidUtf8(part), std::nullopt);
      joined += part;
    }
    joined += detokenizer.Flush();
    ASSERT_EQ(joined, tokenizer->Decode(ids, skip));
  }
}

StopStringMatcher Matcher(std::vector<std::string> stops, bool include_stop = false) {
  auto matcher = StopStringMatcher::Create(std::move(stops), {.include_stop = include_stop});
  EXPECT_OK(matcher);
  return *std::move(matcher);
}

TEST(StopStringMatcherTest, HoldsBackWhatMayBecomeAStop) {
  auto matcher = Matcher({"STOP"});
  EXPECT_EQ(matcher.Push("a ST").text, "a ");
  EXPECT_EQ(matcher.Push("A").text, "STA");
  EXPECT_EQ(matcher.Push("STO").text, "");
  const auto result = matcher.Push("P and more");
  EXPECT_TRUE(result.stopped);
  EXPECT_EQ(result.text, "");
  EXPECT_EQ(result.stop_index, 0u);
  EXPECT_EQ(matcher.Push("nothing more").text, "");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopStringMatcherTest, FlushReleasesTheRest) {
  auto matcher = Matcher({"\n\nUser:"});
  EXPECT_EQ(matcher.Push("hello\n\nUse").text, "hello");
  EXPECT_EQ(matcher.Flush(), "\n\nUse");
}

TEST(StopStringMatcherTest, IncludesTheStopOnRequest) {
  auto matcher = Matcher({"<end>"}, /*include_stop=*/true);
  EXPECT_EQ(matcher.Push("x<en").text, "x");
  const auto result = matcher.Push("d>y");
  EXPECT_TRUE(result.stopped);
  EXPECT_EQ(result.text, "<end>");
}

TEST(StopStringMatcherTest, EarliestEndThenLongestWins) {
  auto result = Matcher({"abc", "b"}).Push("xabc");
  EXPECT_EQ(result.text, "xa");
  EXPECT_EQ(result.stop_index, 1u);
  result = Matcher({"c", "abc", "bc"}).Push("xabc");
  EXPECT_EQ(result.text, "x");
  EXPECT_EQ(result.stop_index, 1u);
}

TEST(StopStringMatcherTest, OverlappingPrefixes) {
  auto matcher = Matcher({"aab"});
  EXPECT_EQ(matcher.Push("aaa").text, "a");
  const auto result = matcher.Push("ab");
  EXPECT_TRUE(result.stopped);
  EXPECT_EQ(result.text, "a");
}

TEST(StopStringMatcherTest, WithoutStopsEverythingPasses) {
  auto matcher = Matcher({});
  EXPECT_EQ(matcher.Push("abc").text, "abc");
  EXPECT_EQ(matcher.Flush(), "");
}

TEST(StopStringMatcherTest, AnyCuttingGivesTheSameAsSearchingTheWhole) {
  std::mt19937 random(9);
  const auto letters = [&](int n) {
    std::string text(n, 'a');
    for (char& c : text) c = "ab"[random() % 2];
    return text;
  };
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::string> stops;
    for (unsigned i = random() % 3 + 1; i > 0; --i) stops.push_back(letters(random() % 5 + 2));
    const std::string text = letters(random() % 30);
    size_t end = std::string::npos;  // of the match that ends first
    size_t begin = 0;
    for (const std::string& stop : stops) {
      const size_t at = text.find(stop);
      if (at == std::string::npos) continue;
      if (at + stop.size() < end || (at + stop.size() == end && at < begin)) {
        end = at + stop.size();
        begin = at;
      }
    }
    auto matcher = Matcher(stops);
    std::string out;
    bool stopped = false;
    for (size_t pos = 0; pos < text.size();) {
      const size_t n = std::min<size_t>(random() % 4 + 1, text.size() - pos);
      const auto result = matcher.Push(std::string_view(text).substr(pos, n));
      out += result.text;
      stopped = stopped || result.stopped;
      pos += n;
    }
    out += matcher.Flush();
    ASSERT_EQ(stopped, end != std::string::npos) << text;
    ASSERT_EQ(out, stopped ? text.substr(0, begin) : text);
  }
}

TEST(StopStringMatcherTest, RefusesStopsThatCannotBe) {
  const auto empty = StopStringMatcher::Create({"a", ""}, {});
  EXPECT_EQ(empty.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(empty.status().message()), testing::HasSubstr("stop[1]"));
  const auto broken = StopStringMatcher::Create({"a\xFF"}, {});
  EXPECT_THAT(std::string(broken.status().message()),
              testing::HasSubstr("stop[0] is not valid UTF-8 at byte 1"));
}

}  // namespace
}  // namespace tandem
