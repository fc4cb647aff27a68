#include "common/text/generation_config.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(GenerationConfigTest, ReadsWhatQwenModelsSay) {
  const auto defaults = ParseGenerationConfig(R"({
    "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": true, "eos_token_id": [151645, 151643, 151645],
    "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 2048,
    "transformers_version": "4.37.0"})");
  ASSERT_OK(defaults);
  EXPECT_THAT(defaults->eos_token_ids, ElementsAre(151645, 151643));
  EXPECT_EQ(defaults->bos_token_id, 151643);
  EXPECT_EQ(defaults->pad_token_id, 151643);
  EXPECT_EQ(defaults->do_sample, true);
  EXPECT_EQ(defaults->repetition_penalty, 1.05);
  EXPECT_EQ(defaults->temperature, 0.7);
  EXPECT_EQ(defaults->top_p, 0.8);
  EXPECT_EQ(defaults->top_k, 20);
  EXPECT_EQ(defaults->max_new_tokens, 2048);
  EXPECT_EQ(defaults->min_p, std::nullopt);
}

TEST(GenerationConfigTest, AbsentAndNullAreUnset) {
  const auto defaults = ParseGenerationConfig(R"({"temperature": null, "eos_token_id": 7})");
  ASSERT_OK(defaults);
  EXPECT_THAT(defaults->eos_token_ids, ElementsAre(7));
  EXPECT_EQ(defaults->temperature, std::nullopt);
  EXPECT_EQ(defaults->do_sample, std::nullopt);
  const auto none = LoadGenerationConfig(SourcePath("tests/data/text"));  // has no such file
  ASSERT_OK(none);
  EXPECT_THAT(none->eos_token_ids, IsEmpty());
}

TEST(GenerationConfigTest, BadValuesNameTheField) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"temperature": -1})", "temperature: must be a number of at least 0, got -1"},
      {R"({"temperature": "hot"})", "temperature: must be a number"},
      {R"({"top_p": 0})", "top_p: must be a number above 0 and at most 1, got 0"},
      {R"({"top_p": 1.5})", "top_p"},
      {R"({"min_p": -0.1})", "min_p"},
      {R"({"top_k": 1.5})", "top_k: must be an integer of at least 0, got 1.5"},
      {R"({"top_k": 99999999999})", "top_k"},
      {R"({"repetition_penalty": 0})", "repetition_penalty"},
      {R"({"do_sample": 1})", "do_sample: must be true or false, got 1"},
      {R"({"eos_token_id": [1, -2]})", "eos_token_id: must be an integer of at least 0, got -2"},
      {R"({"eos_token_id": "x"})", "eos_token_id"},
      {R"({"max_new_tokens": 0})", "max_new_tokens"},
      {"[1]", "must be a JSON object"},
      {"{", "not valid JSON at byte"},
  };
  for (const auto& [json, message] : cases) {
    const absl::Status status = ParseGenerationConfig(json).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << json;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message)) << json;
    EXPECT_THAT(std::string(status.message()), HasSubstr("generation_config.json")) << json;
  }
}

}  // namespace
}  // namespace tandem
