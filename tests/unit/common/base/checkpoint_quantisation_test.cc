// What a checkpoint says of its quantisation: what is read, and what is refused by its name.
#include "common/base/checkpoint_quantisation.h"

#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "common/base/model_config.h"
#include "common/base/model_digest.h"
#include "tests/support/paths.h"
#include "tests/support/temp_dir.h"

namespace tandem {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

json Gptq() {
  return {{"quant_method", "gptq"}, {"bits", 4},       {"group_size", 64}, {"sym", true},
          {"desc_act", true},       {"lm_head", false}};
}
json Awq() {
  return {{"quant_method", "awq"}, {"bits", 4},          {"group_size", 128},
          {"version", "gemm"},     {"zero_point", true}, {"modules_to_not_convert", nullptr}};
}
json With(json object, const char* key, json value) {
  object[key] = std::move(value);
  return object;
}

absl::StatusOr<CheckpointQuantisation> Parse(const json& object) {
  return CheckpointQuantisation::Parse(object, "", "config.json");
}
std::string DescriptionOf(const json& object) {
  const auto found = Parse(object);
  return found.ok() ? found->Describe() : found.status().ToString();
}
std::string ErrorOf(const json& object) { return std::string(Parse(object).status().message()); }

TEST(CheckpointQuantisationTest, ReadsWhatGptqAndAwqToolsWrite) {
  EXPECT_EQ(DescriptionOf(Gptq()), "GPTQ, 4 bits, groups of 64, symmetric, act-order");
  const json asymmetric = With(With(Gptq(), "sym", false), "desc_act", false);
  EXPECT_EQ(DescriptionOf(asymmetric), "GPTQ, 4 bits, groups of 64, asymmetric (v1)");
  for (const char* key : {"checkpoint_format", "format"}) {
    EXPECT_EQ(DescriptionOf(With(asymmetric, key, "gptq_v2")),
              "GPTQ, 4 bits, groups of 64, asymmetric (v2)");
  }
  EXPECT_EQ(DescriptionOf(With(Gptq(), "group_size", -1)),
            "GPTQ, 4 bits, one group, symmetric, act-order");
  EXPECT_EQ(DescriptionOf(Awq()), "AWQ, 4 bits, groups of 128");
  EXPECT_EQ(DescriptionOf(With(Awq(), "version", "GEMM")), "AWQ, 4 bits, groups of 128");
  // Layers that were left as they are.
  EXPECT_OK(Parse(With(Gptq(), "dynamic", {{"-:.*down_proj", json::object()}})));
}

TEST(CheckpointQuantisationTest, RefusesOtherKindsByTheirNames) {
  const std::pair<json, const char*> refused[] = {
      {With(Gptq(), "bits", 3), "3-bit GPTQ weights"},
      {With(Gptq(), "bits", 8), "8-bit GPTQ weights"},
      {With(Awq(), "bits", 3), "3-bit AWQ weights"},
      {With(Gptq(), "checkpoint_format", "marlin"), "Marlin-packed GPTQ weights"},
      {With(Gptq(), "is_marlin_format", true), "Marlin-packed GPTQ weights"},
      {With(Gptq(), "checkpoint_format", "bitblas"), "\"bitblas\": GPTQ weights"},
      {With(Gptq(), "dynamic", {{".*down_proj", {{"bits", 8}}}}), "\"dynamic\""},
      {With(Awq(), "version", "gemv"), "AWQ gemv weights"},
      {With(Awq(), "version", "gemv_fast"), "AWQ gemv_fast weights"},
      {With(Awq(), "version", "marlin"), "Marlin-packed AWQ weights"},
      {With(Awq(), "backend", "llm-awq"), "AWQ of llm-awq weights"},
      {{{"quant_method", "marlin"}, {"bits", 4}}, "Marlin-packed weights"},
      {{{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}}, "bitsandbytes weights"},
      {{{"load_in_8bit", true}}, "bitsandbytes weights"},
      {{{"quant_method", "gguf"}}, "GGUF weights"},
      {{{"quant_method", "compressed-tensors"}}, "compressed-tensors weights"},
      {{{"quant_method", "fp8"}}, "fp8 weights"},
  };
  for (const auto& [object, name] : refused) {
    EXPECT_THAT(ErrorOf(object),
                AllOf(StartsWith("config.json: "), HasSubstr(name),
                      HasSubstr("not supported; take"), HasSubstr("scripts/quantize")))
        << object;
  }
}

TEST(CheckpointQuantisationTest, SaysWhichKeyIsWrong) {
  EXPECT_EQ(ErrorOf({{"bits", 4}}), "config.json: quant_method is missing");
  EXPECT_EQ(ErrorOf({{"quant_method", "gptq"}}), "config.json: bits is missing");
  EXPECT_THAT(ErrorOf(With(Gptq(), "group_size", 48)), HasSubstr("group_size 48 is not supported"));
  EXPECT_THAT(ErrorOf(With(Gptq(), "sym", 1)), HasSubstr("sym must be true or false"));
  EXPECT_THAT(ErrorOf(With(Gptq(), "quant_method", 4)), HasSubstr("quant_method must be a string"));
  EXPECT_THAT(ErrorOf(json::array()), HasSubstr("must be a JSON object"));
}

// A model directory whose config.json is not quantised, with files beside it.
class QuantisationFileTest : public ::testing::Test {
 protected:
  QuantisationFileTest() {
    for (const char* file : {"config.json", "model.safetensors"}) {
      std::filesystem::copy(SourcePath("tests/data/engine/qwen2-gqa/") + file, dir_.path());
    }
  }
  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(Path(name)) << content;
  }
  std::string Path(const std::string& name) const { return dir_.path() + "/" + name; }
  std::string Describe() const {
    const auto config = ModelConfig::Load(dir_.path());
    if (!config.ok()) return std::string(config.status().message());
    return config->quantisation.has_value() ? config->quantisation->Describe() : "none";
  }

  const TempDir dir_;
};

TEST_F(QuantisationFileTest, OfAnOlderToolCountsWhereConfigJsonIsSilent) {
  EXPECT_EQ(Describe(), "none");
  Write("quant_config.json",
        R"({"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"})");
  EXPECT_EQ(Describe(), "AWQ, 4 bits, groups of 64");
  Write("quantize_config.json", R"({"bits": 4, "group_size": 32, "sym": true, "desc_act": false})");
  EXPECT_EQ(Describe(), "GPTQ, 4 bits, groups of 32, symmetric");
  Write("quantize_config.json", R"({"bits": 2, "group_size": 32})");
  EXPECT_EQ(Describe().substr(0, Path("quantize_config.json: 2-bit GPTQ weights are not").size()),
            Path("quantize_config.json: 2-bit GPTQ weights are not"));
  Write("quantize_config.json", "{");
  EXPECT_EQ(Describe(), Path("quantize_config.json: not valid JSON"));
}

TEST_F(QuantisationFileTest, IsPartOfTheModelsDigest) {
  const auto plain = CheckpointDigest(dir_.path());
  Write("quantize_config.json", R"({"bits": 4, "checkpoint_format": "gptq"})");
  const auto v1 = CheckpointDigest(dir_.path());
  Write("quantize_config.json", R"({"bits": 4, "checkpoint_format": "gptq_v2"})");
  const auto v2 = CheckpointDigest(dir_.path());
  ASSERT_OK(plain);
  ASSERT_OK(v1);
  ASSERT_OK(v2);
  EXPECT_NE(*plain, *v1);
  EXPECT_NE(*v1, *v2);
}

TEST_F(QuantisationFileTest, AGgufFileIsRefusedByName) {
  Write("model.gguf", "GGUF");
  EXPECT_EQ(Describe(), "none");  // the safetensors beside it are read
  EXPECT_THAT(std::string(ModelConfig::Load(Path("model.gguf")).status().message()),
              HasSubstr("model.gguf: GGUF weights are not supported; take"));
  std::filesystem::remove(Path("config.json"));
  EXPECT_THAT(Describe(), HasSubstr("GGUF weights are not supported; take"));
}

}  // namespace
}  // namespace tandem
