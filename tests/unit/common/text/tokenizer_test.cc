#include "common/text/tokenizer.h"

#include <random>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/text/utf8.h"
#include "tests/unit/common/text/text_fixtures.h"

namespace tandem {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

std::vector<int32_t> Encode(const Tokenizer& tokenizer, std::string_view text,
                            bool parse_special = true) {
  std::vector<int32_t> ids;
  EXPECT_OK(tokenizer.Encode(text, parse_special, &ids));
  return ids;
}

std::vector<int32_t> EncodeSegments(const Tokenizer& tokenizer,
                                    const std::vector<TextSegment>& segments) {
  std::vector<int32_t> ids;
  EXPECT_OK(tokenizer.Encode(segments, &ids));
  return ids;
}

int32_t Id(const char* token) { return FixtureTokenizer()->TokenToId(token).value(); }

// Both directions of cases made by Hugging Face.
void ExpectEqualsHuggingFace(const Tokenizer& tokenizer, const json& cases) {
  ASSERT_GT(cases.size(), 100u);
  for (const json& test : cases) {
    const auto ids = test["ids"].get<std::vector<int32_t>>();
    if (test.contains("text")) {
      EXPECT_EQ(Encode(tokenizer, test["text"].get<std::string>()), ids) << test.dump();
    }
    EXPECT_EQ(tokenizer.Decode(ids, false), test["decoded"].get<std::string>()) << test.dump();
    if (test.contains("decoded_skip")) {
      EXPECT_EQ(tokenizer.Decode(ids, true), test["decoded_skip"].get<std::string>())
          << test.dump();
    }
  }
}

TEST(TokenizerTest, EqualsHuggingFaceOnTheFixture) {
  ExpectEqualsHuggingFace(*FixtureTokenizer(), FixtureJson("tokenizer_cases.json"));
  ExpectEqualsHuggingFace(*FixtureTokenizer(), FixtureJson("decode_cases.json"));
}

TEST(TokenizerTest, EqualsHuggingFaceOnQwen) {
  TANDEM_REQUIRE_SHARED();
  const std::string dir = SharedDir() + "/reference";
  const auto tokenizer = Tokenizer::Load(dir + "/qwen2.5-tokenizer/tokenizer.json");
  ASSERT_OK(tokenizer);
  EXPECT_EQ((*tokenizer)->vocab_size(), 151665);
  EXPECT_EQ((*tokenizer)->TokenToId("<|im_end|>"), 151645);
  EXPECT_EQ((*tokenizer)->max_token_bytes(), 128u);
  ExpectEqualsHuggingFace(**tokenizer,
                          json::parse(ReadFile(dir + "/qwen_tokenizer_cases.json").value()));
}

TEST(TokenizerTest, EqualsHuggingFaceOnThePipelinesOfOtherFamilies) {
  for (const std::string name : {"llama3", "gpt2"}) {
    SCOPED_TRACE(name);
    const auto tokenizer = Tokenizer::Parse(FixtureText(name + "_tokenizer.json"));
    ASSERT_OK(tokenizer);
    const json cases = FixtureJson(name + "_cases.json");
    ExpectEqualsHuggingFace(**tokenizer, cases);
    for (const json& test : cases) {
      std::vector<int32_t> ids((*tokenizer)->prefix_ids().begin(),
                               (*tokenizer)->prefix_ids().end());
      ASSERT_OK((*tokenizer)->Encode(test["text"].get<std::string>(), true, &ids));
      ids.insert(ids.end(), (*tokenizer)->suffix_ids().begin(), (*tokenizer)->suffix_ids().end());
      EXPECT_EQ(ids, test["with_special"].get<std::vector<int32_t>>()) << test.dump();
    }
  }
}

TEST(TokenizerTest, MergesAsStringsAndAsPairsAreTheSame) {
  json file = FixtureJson("tokenizer.json");
  json& merges = file["model"]["merges"];
  ASSERT_TRUE(merges[0].is_array());
  for (json& merge : merges)
    merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  const auto as_strings = Tokenizer::Parse(file.dump());
  ASSERT_OK(as_strings);
  EXPECT_EQ((*as_strings)->digest(), FixtureTokenizer()->digest()) << "layout must not matter";
  ExpectEqualsHuggingFace(**as_strings, FixtureJson("tokenizer_cases.json"));
}

TEST(TokenizerTest, DigestTellsTokenizersApart) {
  json file = FixtureJson("tokenizer.json");
  file["model"]["merges"].erase(file["model"]["merges"].size() - 1);
  EXPECT_NE(Tokenizer::Parse(file.dump()).value()->digest(), FixtureTokenizer()->digest());
  file = FixtureJson("tokenizer.json");
  file["normalizer"] = nullptr;
  EXPECT_NE(Tokenizer::Parse(file.dump()).value()->digest(), FixtureTokenizer()->digest());
  EXPECT_EQ(FixtureTokenizer()->digest().size(), 32u);
}

TEST(TokenizerTest, WithoutNormalizerTextIsLeftAlone) {
  json file = FixtureJson("tokenizer.json");
  file["normalizer"] = nullptr;
  const auto tokenizer = Tokenizer::Parse(file.dump()).value();
  EXPECT_EQ(tokenizer->Decode(Encode(*tokenizer, "e\u0301"), false), "e\u0301");
  EXPECT_EQ(FixtureTokenizer()->Decode(Encode(*FixtureTokenizer(), "e\u0301"), false), "\u00E9");
}

TEST(TokenizerTest, SpecialTokensOnlyWhereParsed) {
  const auto tokenizer = FixtureTokenizer();
  EXPECT_THAT(Encode(*tokenizer, "<|im_end|>"), ElementsAre(Id("<|im_end|>")));
  const auto plain = Encode(*tokenizer, "<|im_end|>", /*parse_special=*/false);
  EXPECT_GT(plain.size(), 1u);
  EXPECT_EQ(tokenizer->Decode(plain, true), "<|im_end|>");
  // Not across a border, even between two stretches that are parsed.
  EXPECT_EQ(EncodeSegments(*tokenizer, {{"<|im_", true}, {"end|>", true}}), plain);
  EXPECT_EQ(EncodeSegments(*tokenizer, {{"<|im_end", true}, {"|>", false}}), plain);
  // A longer token that does not fit does not hide the shorter one that does.
  EXPECT_EQ(EncodeSegments(*tokenizer, {{"<|im_end|>", true}, {"!", false}}),
            (std::vector<int32_t>{Id("<|im_end|>"), Id("!")}));
  EXPECT_THAT(Encode(*tokenizer, "<|im_end|>!"), ElementsAre(Id("<|im_end|>!")));
}

TEST(TokenizerTest, NormalizedAddedTokensKeepToTheirSegments) {
  const auto tokenizer = FixtureTokenizer();
  const int32_t cafe = Id("caf\u00E9");
  EXPECT_THAT(Encode(*tokenizer, "cafe\u0301"), ElementsAre(cafe));
  EXPECT_THAT(EncodeSegments(*tokenizer, {{"cafe\u0301", true}, {"", false}}), ElementsAre(cafe));
  const auto plain = Encode(*tokenizer, "caf\u00E9", false);
  EXPECT_GT(plain.size(), 1u);
  EXPECT_EQ(EncodeSegments(*tokenizer, {{"cafe", true}, {"\u0301", false}}), plain);
  EXPECT_EQ(EncodeSegments(*tokenizer, {{"cafe", false}, {"\u0301", true}}), plain);
  // Text that changed before it shifts it, no more.
  auto shifted = Encode(*tokenizer, "e\u0301 ", false);
  shifted.push_back(cafe);
  EXPECT_EQ(EncodeSegments(*tokenizer, {{"e\u0301 ", false}, {"cafe\u0301", true}}), shifted);
}

TEST(TokenizerTest, SegmentsAreOneText) {
  const auto tokenizer = FixtureTokenizer();
  std::mt19937 random(3);
  for (const json& test : FixtureJson("tokenizer_cases.json")) {
    const std::string text = test["text"];
    const auto whole = Encode(*tokenizer, text, false);
    std::vector<TextSegment> segments;
    for (size_t pos = 0; pos < text.size();) {
      size_t end = std::min<size_t>(text.size(), pos + 1 + random() % 6);
      while (end < text.size() && (text[end] & 0xC0) == 0x80) ++end;
      segments.push_back({text.substr(pos, end - pos), false});
      pos = end;
    }
    EXPECT_EQ(EncodeSegments(*tokenizer, segments), whole) << text;
  }
}

TEST(TokenizerTest, AppendsAndLeavesIdsAloneOnError) {
  std::vector<int32_t> ids = {7};
  ASSERT_OK(FixtureTokenizer()->Encode("!", true, &ids));
  EXPECT_THAT(ids, ElementsAre(7, Id("!")));
  const absl::Status status = FixtureTokenizer()->Encode("abc\xF0\x9F", true, &ids);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("not valid UTF-8 at byte 3"));
  EXPECT_THAT(ids, ElementsAre(7, Id("!")));
  const std::vector<TextSegment> segments = {{"ab", true}, {"c\xFF", false}};
  EXPECT_THAT(std::string(FixtureTokenizer()->Encode(segments, &ids).message()),
              HasSubstr("at byte 3"));
}

TEST(TokenizerTest, EmptyText) {
  EXPECT_TRUE(Encode(*FixtureTokenizer(), "").empty());
  EXPECT_TRUE(EncodeSegments(*FixtureTokenizer(), {}).empty());
  EXPECT_TRUE(EncodeSegments(*FixtureTokenizer(), {{"", true}, {"", false}}).empty());
  EXPECT_EQ(FixtureTokenizer()->Decode({}, false), "");
}

TEST(TokenizerTest, IdsThatAreNoTokensAreSkipped) {
  const auto tokenizer = FixtureTokenizer();
  const std::vector<int32_t> ids = {-1,        Id("!"),   tokenizer->vocab_size(),
                                    INT32_MAX, INT32_MIN, Id("!")};
  EXPECT_EQ(tokenizer->Decode(ids, false), "!!");
  EXPECT_FALSE(tokenizer->IsToken(-1));
  EXPECT_FALSE(tokenizer->IsSpecial(tokenizer->vocab_size()));
  EXPECT_EQ(tokenizer->TokenBytes(-1), "");
  EXPECT_EQ(tokenizer->TokenToId("no such token"), std::nullopt);
}

TEST(TokenizerTest, TokenFacts) {
  const auto tokenizer = FixtureTokenizer();
  EXPECT_TRUE(tokenizer->IsSpecial(Id("<|im_end|>")));
  EXPECT_FALSE(tokenizer->IsSpecial(Id("<tool_call>")));
  EXPECT_FALSE(tokenizer->IsSpecial(Id("!")));
  EXPECT_EQ(tokenizer->TokenBytes(Id("\u0120")), " ");  // byte-level symbol of the space
  EXPECT_EQ(tokenizer->TokenBytes(Id("<|im_end|>")), "<|im_end|>");
  EXPECT_EQ(tokenizer->vocab_size(), Id("na\u00EFve") + 1);
}

// The heap for long pieces and the scan for short ones must agree: a run of letters is one piece
// whatever its length, and appending a character that merges with nothing must not change what is
// before it.
TEST(TokenizerTest, LongPiecesAreMergedLikeShortOnes) {
  const auto tokenizer = FixtureTokenizer();
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    std::string text;
    const size_t length = 30 + random() % 60;
    while (text.size() < length) text += "etoinsahr"[random() % 9];
    // U+0251 shares no merge with ASCII letters in this vocabulary; it lengthens the piece beyond
    // the short one's limit.
    std::string tail;
    for (int i = 0; i < 40; ++i) tail += "\u0251";
    auto want = Encode(*tokenizer, text);
    const auto tail_ids = Encode(*tokenizer, tail);
    want.insert(want.end(), tail_ids.begin(), tail_ids.end());
    ASSERT_EQ(Encode(*tokenizer, text + tail), want) << text;
  }
}

TEST(TokenizerTest, AMillionBytesInOnePiece) {
  const auto tokenizer = FixtureTokenizer();
  for (const char* unit : {"a", " ", "=", "the", "e\u0301\u0316"}) {
    std::string text;
    while (text.size() < 1'000'000) text += unit;
    const auto ids = Encode(*tokenizer, text);
    if (std::string_view(unit).size() <= 3) {
      EXPECT_EQ(tokenizer->Decode(ids, false), text);
    }
    EXPECT_GE(ids.size() * tokenizer->max_token_bytes(), text.size() / 3);
  }
}

TEST(TokenizerTest, IgnoreMergesTakesWholeTokens) {
  json file = FixtureJson("tokenizer.json");
  const int32_t next = FixtureTokenizer()->vocab_size();
  file["model"]["vocab"]["xyzzy"] = next;  // no merge leads here
  auto tokenizer = Tokenizer::Parse(file.dump()).value();
  EXPECT_GT(Encode(*tokenizer, "xyzzy").size(), 1u);
  file["model"]["ignore_merges"] = true;
  tokenizer = Tokenizer::Parse(file.dump()).value();
  EXPECT_THAT(Encode(*tokenizer, "xyzzy"), ElementsAre(next));
}

TEST(TokenizerTest, ManyThreadsShareOne) {
  const auto tokenizer = FixtureTokenizer();
  const json cases = FixtureJson("tokenizer_cases.json");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] { ExpectEqualsHuggingFace(*tokenizer, cases); });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace tandem
