// What `tandem inspect` and `tandem up` find wrong with a model directory before anything starts.
#include "cli/model_check.h"

#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "cli/command.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A copy of the demo model, with whatever a test does to it.
class ModelCheckTest : public testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::remove_all(dir_);
    std::filesystem::copy(SourcePath("models/demo"), dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(dir_ + "/" + name) << content;
  }
  std::string Path(const std::string& name) const { return dir_ + "/" + name; }
  std::string Problem() const { return std::string(CheckModel(dir_, false).status().message()); }
  // As two shards of which the second holds nothing.
  void Split() const {
    std::filesystem::rename(Path("model.safetensors"), Path("model-1.safetensors"));
    Write("model-2.safetensors", std::string("\x02\0\0\0\0\0\0\0{}", 10));
    Write("model.safetensors.index.json",
          R"({"weight_map": {"model.norm.weight": "model-1.safetensors",
                             "model.other.weight": "model-2.safetensors"}})");
  }
  void CountsOneLayerMore() const {
    std::ifstream in(Path("config.json"));
    nlohmann::json config = nlohmann::json::parse(in);
    config["num_hidden_layers"] = config["num_hidden_layers"].get<int>() + 1;
    Write("config.json", config.dump());
    EXPECT_THAT(Problem(), HasSubstr("tensors are missing"));
  }
  static int Inspect(const std::string& dir, std::string* error) {
    testing::internal::CaptureStderr();
    testing::internal::CaptureStdout();
    const int exit_code = RunInspect({dir});
    testing::internal::GetCapturedStdout();
    *error = testing::internal::GetCapturedStderr();
    return exit_code;
  }

  const std::string dir_ = testing::TempDir() + "model_check_test_" +
                           testing::UnitTest::GetInstance()->current_test_info()->name();
};

TEST_F(ModelCheckTest, AWholeModelPasses) {
  const auto model = CheckModel(dir_, false);
  ASSERT_OK(model);
  EXPECT_EQ(model->weight_files, 1);
  EXPECT_EQ(model->checkpoint_bytes,
            static_cast<int64_t>(std::filesystem::file_size(Path("model.safetensors"))));
  EXPECT_TRUE(model->has_tokenizer);
  EXPECT_TRUE(model->has_chat_template);
  EXPECT_TRUE(model->warnings.empty());
}

// B12: `inspect` ended with 0 on these.
TEST_F(ModelCheckTest, InspectRefusesATruncatedFile) {
  std::filesystem::resize_file(Path("model.safetensors"), 4'800'000);
  EXPECT_THAT(Problem(), AllOf(HasSubstr("model.safetensors"), HasSubstr("cut off")));
  std::string error;
  EXPECT_EQ(Inspect(dir_, &error), kExitFailed);
  EXPECT_THAT(error, AllOf(HasSubstr("model.safetensors"), HasSubstr("cut off")));
  std::filesystem::resize_file(Path("model.safetensors"), 1000);
  EXPECT_THAT(Problem(), HasSubstr("truncated or not safetensors"));
}

TEST_F(ModelCheckTest, InspectRefusesAMissingShard) {
  Split();
  std::filesystem::remove(Path("model-2.safetensors"));
  EXPECT_THAT(Problem(), HasSubstr("model-2.safetensors: no such file; it is one of 2 shards"));
  std::string error;
  EXPECT_EQ(Inspect(dir_, &error), kExitFailed);
  EXPECT_THAT(error, HasSubstr("model-2.safetensors"));
}

TEST_F(ModelCheckTest, AShardMustHoldWhatTheIndexSays) {
  Split();
  EXPECT_THAT(Problem(), HasSubstr("\"model.other.weight\" is not in model-2.safetensors"));
}

TEST_F(ModelCheckTest, CountsParameters) { CountsOneLayerMore(); }

TEST_F(ModelCheckTest, CountsParametersOfQuantisedLayers) {
  const std::string dir = SourcePath("tests/data/quantised/gptq");
  const auto model = CheckModel(dir, false);
  ASSERT_OK(model);
  EXPECT_THAT(model->warnings, ElementsAre(HasSubstr("dequantised"), HasSubstr("tokenizer.json")));
  std::filesystem::copy(
      dir, dir_,
      std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
  CountsOneLayerMore();
}

TEST_F(ModelCheckTest, RefusesKindsOfQuantisationBeforeAnythingStarts) {
  std::ifstream in(Path("config.json"));
  nlohmann::json config = nlohmann::json::parse(in);
  config["quantization_config"] = {{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}};
  Write("config.json", config.dump());
  EXPECT_THAT(Problem(), HasSubstr("bitsandbytes weights are not supported; take"));
}

TEST_F(ModelCheckTest, LooksAtTextToo) {
  Write("generation_config.json", R"({"top_p": 3})");
  EXPECT_THAT(Problem(), HasSubstr("top_p"));
  Write("generation_config.json", "{}");
  Write("tokenizer.json", "{}");
  EXPECT_NE(Problem(), "");
  std::filesystem::remove(Path("tokenizer.json"));
  const auto model = CheckModel(dir_, false);
  ASSERT_OK(model);
  EXPECT_THAT(model->warnings, ElementsAre(HasSubstr("no tokenizer.json")));
}

TEST_F(ModelCheckTest, DummyWeightsNeedNoFiles) {
  std::filesystem::remove(Path("model.safetensors"));
  EXPECT_THAT(Problem(), HasSubstr("holds neither"));
  const auto model = CheckModel(dir_, true);
  ASSERT_OK(model);
  EXPECT_EQ(model->weight_files, 0);
}

}  // namespace
}  // namespace tandem::cli
