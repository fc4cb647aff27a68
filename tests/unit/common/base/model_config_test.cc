#include "common/base/model_config.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

using testing::HasSubstr;

// Qwen2.5-7B-Instruct's published config.json, less the keys that nothing reads.
constexpr char kQwen7B[] = R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
  "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
  "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 152064,
  "use_sliding_window": false, "eos_token_id": 151645, "bos_token_id": 151643 EXTRA})";

std::string WithExtra(std::string extra) {
  std::string text = kQwen7B;
  return text.replace(text.find(" EXTRA"), 6, extra.empty() ? "" : ", " + extra);
}

TEST(ModelConfig, ReadsQwen7B) {
  const auto config = ModelConfig::Parse(WithExtra(""), "config.json");
  ASSERT_OK(config);
  EXPECT_EQ(config->NumParameters(), 7'615'616'512);
  EXPECT_EQ(config->LayoutFor(16, DType::kBFloat16).BytesPerToken(), 57'344u);
  EXPECT_EQ(config->MaxModelLen(), 32768);
  EXPECT_THAT(config->eos_token_ids, testing::ElementsAre(151645));
}

TEST(ModelConfig, YarnStretchesTheLongestLength) {
  const auto config =
      ModelConfig::Parse(WithExtra(R"("rope_scaling": {"type": "yarn", "factor": 4.0,
                  "original_max_position_embeddings": 32768})"),
                         "config.json");
  ASSERT_OK(config);
  ASSERT_TRUE(config->yarn.has_value());
  EXPECT_EQ(config->MaxModelLen(), 131072);
}

TEST(ModelConfig, MultiHeadAttentionNeedsNoKvHeadsKey) {
  std::string text = WithExtra("");
  text.replace(text.find("\"num_key_value_heads\": 4,"), 25, "");
  const auto config = ModelConfig::Parse(text, "config.json");
  ASSERT_OK(config);
  EXPECT_EQ(config->num_kv_heads, 28);
}

struct Bad {
  const char* find;
  const char* replace;
  const char* message;
};

class ModelConfigErrors : public testing::TestWithParam<Bad> {};

TEST_P(ModelConfigErrors, NameTheKey) {
  std::string text = WithExtra("");
  const size_t at = text.find(GetParam().find);
  ASSERT_NE(at, std::string::npos);
  text.replace(at, std::string(GetParam().find).size(), GetParam().replace);
  const auto config = ModelConfig::Parse(text, "dir/config.json");
  ASSERT_FALSE(config.ok());
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(config.status().message()), HasSubstr(GetParam().message));
  EXPECT_THAT(std::string(config.status().message()), HasSubstr("dir/config.json"));
}

INSTANTIATE_TEST_SUITE_P(
    All, ModelConfigErrors,
    testing::Values(
        Bad{"\"hidden_size\": 3584", "\"hidden_size\": \"big\"", "hidden_size must be an integer"},
        Bad{"\"hidden_size\": 3584,", "", "hidden_size is missing"},
        Bad{"\"hidden_size\": 3584", "\"hidden_size\": 1e99", "hidden_size must be"},
        Bad{"\"num_key_value_heads\": 4", "\"num_key_value_heads\": 5", "must divide"},
        Bad{"\"num_hidden_layers\": 28", "\"num_hidden_layers\": -1", "num_hidden_layers"},
        Bad{"Qwen2ForCausalLM", "LlamaForCausalLM", "LlamaForCausalLM"},
        Bad{"\"silu\"", "\"gelu\"", "hidden_act"},
        Bad{"\"use_sliding_window\": false", "\"use_sliding_window\": true", "use_sliding_window"},
        Bad{"\"bfloat16\"", "\"int3\"", "torch_dtype"}, Bad{"151645", "99999999", "eos_token_id"},
        Bad{"{\"arch", "{{\"arch", "not valid JSON"}));

}  // namespace
}  // namespace tandem
