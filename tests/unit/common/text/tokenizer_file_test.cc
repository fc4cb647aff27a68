// Malformed and unsupported tokenizer.json: a clear status, never a crash.
#include "common/text/tokenizer_file.h"

#include <functional>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/unit/common/text/text_fixtures.h"

namespace tandem {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::string ErrorOf(const std::string& text) {
  const auto tokenizer = Tokenizer::Parse(text);
  if (tokenizer.ok()) return "accepted";
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(tokenizer.status().message());
}

struct BadFile {
  const char* name;
  std::function<void(json&)> spoil;
  const char* message;
};

TEST(TokenizerFileTest, ErrorsNameTheJsonPath) {
  const BadFile files[] = {
      {"no model", [](json& f) { f.erase("model"); }, "model: must be an object"},
      {"other model", [](json& f) { f["model"]["type"] = "Unigram"; },
       "model: only type BPE is supported, got \"Unigram\""},
      {"vocab", [](json& f) { f["model"]["vocab"] = json::array(); },
       "model.vocab: must be an object"},
      {"negative id", [](json& f) { f["model"]["vocab"]["a"] = -1; },
       "model.vocab[\"a\"]: a token id must be an integer from 0"},
      {"huge id", [](json& f) { f["model"]["vocab"]["a"] = 2'000'000'000; }, "got 2000000000"},
      {"beyond 64 bits", [](json& f) { f["model"]["vocab"]["a"] = 1e30; }, "model.vocab[\"a\"]"},
      {"text id", [](json& f) { f["model"]["vocab"]["a"] = "7"; }, "got \"7\""},
      {"same id", [](json& f) { f["model"]["vocab"]["a"] = f["model"]["vocab"]["b"]; },
       "have the same id"},
      {"missing byte", [](json& f) { f["model"]["vocab"].erase("\u0120"); },
       "of byte 0x20 is missing"},
      {"merges", [](json& f) { f["model"]["merges"] = 3; }, "model.merges: must be an array"},
      {"unknown half",
       [](json& f) {
         f["model"]["merges"][5] = {"a", "qqq"};
       },
       "model.merges[5]: \"qqq\" is not in model.vocab"},
      {"unknown result", [](json& f) { f["model"]["merges"][0] = "q ~"; },
       "model.merges[0]: \"q~\" is not in model.vocab"},
      {"three halves", [](json& f) { f["model"]["merges"][1] = "a b c"; },
       "model.merges[1]: must be"},
      {"no space", [](json& f) { f["model"]["merges"][1] = "ab"; }, "model.merges[1]: must be"},
      {"empty half", [](json& f) { f["model"]["merges"][1] = " b"; }, "model.merges[1]: must be"},
      {"numbers",
       [](json& f) {
         f["model"]["merges"][2] = {1, 2};
       },
       "model.merges[2]: must be"},
      {"dropout", [](json& f) { f["model"]["dropout"] = 0.1; }, "model.dropout"},
      {"byte fallback", [](json& f) { f["model"]["byte_fallback"] = true; }, "model.byte_fallback"},
      {"suffix", [](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; },
       "model.end_of_word_suffix"},
      {"ignore_merges", [](json& f) { f["model"]["ignore_merges"] = 1; },
       "model.ignore_merges: must be a boolean"},
      {"normalizer",
       [](json& f) {
         f["normalizer"] = {{"type", "NFKC"}};
       },
       "normalizer: only type NFC is supported, got \"NFKC\""},
      {"no pre-tokenizer", [](json& f) { f["pre_tokenizer"] = nullptr; },
       "pre_tokenizer: only type Sequence is supported, got null"},
      {"other pre-tokenizer",
       [](json& f) {
         f["pre_tokenizer"] = {{"type", "Whitespace"}};
       },
       "pre_tokenizer: only type Sequence"},
      {"three parts", [](json& f) { f["pre_tokenizer"]["pretokenizers"].push_back({}); },
       "pre_tokenizer.pretokenizers: must be [Split or Digits, ..., ByteLevel]"},
      {"behavior", [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; },
       "behavior: only Isolated"},
      {"unknown step",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["type"] = "Punctuation"; },
       "pretokenizers[0]: only types Split and Digits are supported here, got \"Punctuation\""},
      {"invert", [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["invert"] = true; },
       "invert"},
      {"string pattern",
       [](json& f) {
         f["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"String", " "}};
       },
       "pattern: must be {\"Regex\""},
      {"bad regex",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "a(b"; },
       "pattern.Regex: not a valid pattern at byte 3"},
      {"empty match",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "a*"; },
       "can match an empty text"},
      {"prefix space",
       [](json& f) { f["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true; },
       "pretokenizers[1].add_prefix_space"},
      {"second regex", [](json& f) { f["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = 1; },
       "pretokenizers[1].use_regex"},
      {"decoder", [](json& f) { f["decoder"] = nullptr; },
       "decoder: only type ByteLevel is supported, got null"},
      {"post-processor",
       [](json& f) {
         f["post_processor"] = {{"type", "BertProcessing"}};
       },
       "post_processor: only types ByteLevel, TemplateProcessing and Sequence are supported"},
      {"template without a text",
       [](json& f) {
         f["post_processor"] = {{"type", "TemplateProcessing"}, {"single", json::array()}};
       },
       "post_processor.single: must have {\"Sequence\""},
      {"template with an unlisted token",
       [](json& f) {
         f["post_processor"] = {{"type", "TemplateProcessing"},
                                {"single", {{{"SpecialToken", {{"id", "<s>"}}}}}}};
       },
       "post_processor.single[0]: must be a Sequence or a SpecialToken"},
      {"added",
       [](json& f) {
         f["added_tokens"] = {{"a", 1}};
       },
       "added_tokens: must be an array"},
      {"added number", [](json& f) { f["added_tokens"][0] = 5; },
       "added_tokens[0]: must be an object, got 5"},
      {"added id", [](json& f) { f["added_tokens"][2]["id"] = -5; },
       "added_tokens[2].id: a token id must be"},
      {"added empty", [](json& f) { f["added_tokens"][2]["content"] = ""; },
       "added_tokens[2].content: must be a string"},
      {"added flag", [](json& f) { f["added_tokens"][2]["special"] = "yes"; },
       "added_tokens[2].special: must be a boolean"},
      {"added twice",
       [](json& f) { f["added_tokens"][2]["content"] = f["added_tokens"][1]["content"]; },
       "is given twice"},
      {"added id taken", [](json& f) { f["added_tokens"][2]["id"] = f["added_tokens"][1]["id"]; },
       "added_tokens[2].id"},
      {"added id in vocab", [](json& f) { f["added_tokens"][2]["id"] = 0; },
       "added_tokens[2].id: 0 is the id of"},
      {"added and vocab differ", [](json& f) { f["added_tokens"][2]["content"] = "a"; },
       "but model.vocab has \"a\" as"},
  };
  const json good = FixtureJson("tokenizer.json");
  for (const BadFile& bad : files) {
    json file = good;
    bad.spoil(file);
    EXPECT_THAT(ErrorOf(file.dump()), HasSubstr(bad.message)) << bad.name;
  }
}

TEST(TokenizerFileTest, WhatIsNoJsonIsRefusedWithItsPosition) {
  EXPECT_THAT(ErrorOf(""), HasSubstr("tokenizer.json: not valid JSON"));
  EXPECT_THAT(ErrorOf("[]"), HasSubstr("must be an object"));
  EXPECT_THAT(ErrorOf("{\"model\": {]"), HasSubstr("not valid JSON at byte 12"));
  EXPECT_THAT(ErrorOf(std::string(1'000'000, '[')), HasSubstr("nested deeper than"));
  const std::string good = FixtureText("tokenizer.json");
  EXPECT_THAT(ErrorOf(good.substr(0, good.size() / 2)), HasSubstr("not valid JSON at byte"));
}

TEST(TokenizerFileTest, LoadNamesTheFile) {
  EXPECT_EQ(Tokenizer::Load("/no/such/tokenizer.json").status().code(),
            absl::StatusCode::kNotFound);
  const auto status = Tokenizer::Load(SourcePath("tests/data/text/chat_cases.json")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("chat_cases.json"));
}

TEST(TokenizerFileTest, APatternThatBacktracksWithoutEndIsAnError) {
  json file = FixtureJson("tokenizer.json");
  file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a+)+$|b";
  const auto tokenizer = Tokenizer::Parse(file.dump());
  ASSERT_OK(tokenizer);
  std::vector<int32_t> ids;
  const absl::Status status = (*tokenizer)->Encode(std::string(60, 'a') + "!", false, &ids);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(ids.empty());
}

// Flips, drops and doubles bytes: whatever comes out is a status or a tokenizer that works.
TEST(TokenizerFileTest, DamagedFilesNeverCrash) {
  const std::string good = FixtureText("tokenizer.json");
  std::mt19937 random(17);
  int accepted = 0;
  for (int round = 0; round < 400; ++round) {
    std::string text = good;
    for (unsigned n = random() % 4 + 1; n > 0; --n) {
      const size_t at = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text.erase(at, random() % 30);
          break;
        case 2:
          text.insert(at, text.substr(random() % text.size(), random() % 30));
          break;
        default:
          text[at] = "{}[]\",:0-19eE.\\"[random() % 15];
          break;
      }
    }
    const auto tokenizer = Tokenizer::Parse(text);
    if (!tokenizer.ok()) {
      EXPECT_FALSE(tokenizer.status().message().empty());
      continue;
    }
    ++accepted;
    std::vector<int32_t> ids;
    if ((*tokenizer)->Encode("The tokenizer, <|im_start|> caf\u00E9 123\n", true, &ids).ok()) {
      (*tokenizer)->Decode(ids, false);
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 400);
}

}  // namespace
}  // namespace tandem
