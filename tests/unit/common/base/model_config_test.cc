#include "common/base/model_config.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "common/base/model_family.h"
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
  ASSERT_TRUE(std::holds_alternative<YarnScaling>(config->rope_scaling));
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
        Bad{"Qwen2ForCausalLM", "GPT2LMHeadModel", "architectures \"GPT2LMHeadModel\""},
        Bad{"Qwen2ForCausalLM", "LlamaForCausalLM", "model_type \"qwen2\" does not go with"},
        Bad{"[\"Qwen2ForCausalLM\"]", "[]", "architectures must be a list"},
        Bad{"\"silu\"", "\"gelu\"", "hidden_act"},
        Bad{"\"use_sliding_window\": false", "\"use_sliding_window\": true", "use_sliding_window"},
        Bad{"\"bfloat16\"", "\"int3\"", "torch_dtype"}, Bad{"151645", "99999999", "eos_token_id"},
        Bad{"{\"arch", "{{\"arch", "not valid JSON"}));

using nlohmann::json;

// A small config.json of a family with what every family needs.
json Small(const std::string& architecture, const std::string& model_type) {
  return {{"architectures", {architecture}},
          {"model_type", model_type},
          {"vocab_size", 100},
          {"hidden_size", 64},
          {"intermediate_size", 96},
          {"num_hidden_layers", 2},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2}};
}
json Llama() { return Small("LlamaForCausalLM", "llama"); }
json Qwen3() { return Small("Qwen3ForCausalLM", "qwen3"); }
json Mistral() { return Small("MistralForCausalLM", "mistral"); }

absl::StatusOr<ModelConfig> ParseModel(const json& root) {
  return ModelConfig::Parse(root.dump(), "config.json");
}
std::string ModelErrorOf(const json& root) { return ParseModel(root).status().ToString(); }
json WithKey(json root, const std::string& key, const json& value) {
  root[key] = value;
  return root;
}

TEST(ModelFamilyTest, AnUnknownArchitectureIsToldWhichAreKnown) {
  const std::string error = ModelErrorOf(Small("GemmaForCausalLM", "gemma"));
  for (const ModelFamily& family : ModelFamilies()) {
    EXPECT_THAT(error, HasSubstr(std::string(family.architecture)));
  }
}

TEST(ModelFamilyTest, TheModelTypeNamesTheFamilyWhereArchitecturesIsMissing) {
  for (const ModelFamily& family : ModelFamilies()) {
    json root = Small("", std::string(family.model_type));
    root.erase("architectures");
    root["sliding_window"] = nullptr;
    const auto config = ParseModel(root);
    ASSERT_OK(config);
    EXPECT_EQ(config->architecture, family.architecture);
  }
}

TEST(ModelFamilyTest, Qwen3HasNormsOfQueriesAndKeysAndNoBias) {
  const auto config = ParseModel(Qwen3());
  ASSERT_OK(config);
  EXPECT_TRUE(config->qk_norm);
  EXPECT_FALSE(config->qkv_bias || config->output_bias || config->mlp_bias);
  EXPECT_EQ(config->head_dim, 128);  // not hidden_size / num_attention_heads
  EXPECT_EQ(ParseModel(WithKey(Qwen3(), "head_dim", 32))->head_dim, 32);
}

TEST(ModelFamilyTest, LlamaHasBiasesOnlyWhereItSaysSo) {
  EXPECT_FALSE(ParseModel(Llama())->qkv_bias || ParseModel(Llama())->mlp_bias ||
               ParseModel(Llama())->qk_norm);
  EXPECT_EQ(ParseModel(Llama())->head_dim, 16);
  EXPECT_EQ(ParseModel(WithKey(Llama(), "head_dim", nullptr))->head_dim, 16);
  EXPECT_EQ(ParseModel(Llama())->max_position_embeddings, 2048);
  const auto attention = ParseModel(WithKey(Llama(), "attention_bias", true));
  ASSERT_OK(attention);
  EXPECT_TRUE(attention->qkv_bias && attention->output_bias && !attention->mlp_bias);
  EXPECT_EQ(attention->NumParameters() - ParseModel(Llama())->NumParameters(),
            2 * (64 + 2 * 32 + 64));
  const auto mlp = ParseModel(WithKey(Llama(), "mlp_bias", true));
  ASSERT_OK(mlp);
  EXPECT_TRUE(mlp->mlp_bias && !mlp->qkv_bias);
}

TEST(ModelFamilyTest, AWindowIsRefusedUnlessEverySequenceFitsIn) {
  EXPECT_THAT(ModelErrorOf(Mistral()), HasSubstr("sliding_window 4096"));
  EXPECT_OK(ParseModel(WithKey(Mistral(), "sliding_window", nullptr)));
  EXPECT_OK(ParseModel(
      WithKey(WithKey(Mistral(), "sliding_window", 512), "max_position_embeddings", 512)));
  EXPECT_OK(ParseModel(WithKey(Qwen3(), "sliding_window", 16)));  // use_sliding_window is false
  EXPECT_THAT(
      ModelErrorOf(WithKey(Qwen3(), "layer_types", {"full_attention", "sliding_attention"})),
      HasSubstr("layer_types has \"sliding_attention\""));
}

TEST(RopeConfigTest, EveryFormOfEveryAgeIsRead) {
  const json llama3 = {{"factor", 8.0},
                       {"low_freq_factor", 1.0},
                       {"high_freq_factor", 4.0},
                       {"original_max_position_embeddings", 64}};
  json by_rope_type = llama3, by_type = llama3, parameters = llama3;
  by_rope_type["rope_type"] = "llama3";
  by_type["type"] = "llama3";
  parameters["rope_type"] = "llama3";
  parameters["rope_theta"] = 500000.0;
  const json old = WithKey(Llama(), "rope_theta", 500000.0);
  for (const json& root :
       {WithKey(old, "rope_scaling", by_rope_type), WithKey(old, "rope_scaling", by_type),
        WithKey(Llama(), "rope_parameters", parameters)}) {
    const auto config = ParseModel(root);
    ASSERT_OK(config);
    EXPECT_EQ(config->rope_theta, 500000.0);
    const auto* scaling = std::get_if<Llama3Scaling>(&config->rope_scaling);
    ASSERT_NE(scaling, nullptr);
    EXPECT_EQ(scaling->factor, 8.0f);
    EXPECT_EQ(scaling->original_max_position_embeddings, 64);
    EXPECT_EQ(config->MaxModelLen(), 2048);
  }
  const auto plain = ParseModel(
      WithKey(Llama(), "rope_parameters", {{"rope_type", "default"}, {"rope_theta", 1e6}}));
  ASSERT_OK(plain);
  EXPECT_EQ(plain->rope_theta, 1e6);
  EXPECT_TRUE(std::holds_alternative<std::monostate>(plain->rope_scaling));
}

TEST(RopeConfigTest, ErrorsNameTheFieldWithinTheObject) {
  const auto error = [](const json& scaling) {
    return ModelErrorOf(WithKey(Llama(), "rope_scaling", scaling));
  };
  for (const char* kind : {"linear", "dynamic", "longrope", "su"}) {
    EXPECT_THAT(
        error({{"rope_type", kind}, {"factor", 2.0}}),
        HasSubstr(std::string("rope_scaling: rope_type \"") + kind + "\" is not supported"));
  }
  EXPECT_THAT(error({{"type", "linear"}, {"factor", 2.0}}), HasSubstr("rope_scaling: type"));
  EXPECT_THAT(error({{"type", "yarn"}}), HasSubstr("rope_scaling: factor is missing"));
  EXPECT_THAT(error({{"type", "llama3"}, {"factor", 2}}),
              HasSubstr("rope_scaling: low_freq_factor is missing"));
  EXPECT_THAT(
      error({{"type", "llama3"}, {"factor", 2}, {"low_freq_factor", 4}, {"high_freq_factor", 1}}),
      HasSubstr("high_freq_factor 1 must be greater than low_freq_factor 4"));
  EXPECT_THAT(error({{"type", "yarn"}, {"factor", 2}, {"truncate", false}}), HasSubstr("truncate"));
  EXPECT_THAT(error({{"type", "default"}, {"partial_rotary_factor", 0.5}}),
              HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(error({{"full_attention", {{"rope_type", "default"}}}}), HasSubstr("layer to layer"));
  EXPECT_THAT(error("yarn"), HasSubstr("rope_scaling must be an object"));
}

}  // namespace
}  // namespace tandem
