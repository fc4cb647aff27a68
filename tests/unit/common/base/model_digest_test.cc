#include "common/base/model_digest.h"

#include <filesystem>
#include <fstream>

#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

class ModelDigestTest : public testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directories(dir_);
    Write("config.json", "{}");
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }
  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(dir_ + "/" + name, std::ios::binary) << content;
  }
  static std::string Weights(char data) {
    std::string file("\x02\0\0\0\0\0\0\0{}", 10);
    file.resize(100'010, data);
    return file;
  }

  const std::string dir_ = testing::TempDir() + "/model_digest_test";
};

TEST_F(ModelDigestTest, NamesConfigAndWeights) {
  Write("model.safetensors", Weights('a'));
  const auto digest = CheckpointDigest(dir_);
  ASSERT_OK(digest);
  EXPECT_EQ(digest->size(), 32u);
  EXPECT_EQ(CheckpointDigest(dir_).value(), *digest);
  Write("model.safetensors", Weights('b'));
  EXPECT_NE(CheckpointDigest(dir_).value(), *digest);
  Write("model.safetensors", Weights('a'));
  Write("config.json", "{ }");
  EXPECT_NE(CheckpointDigest(dir_).value(), *digest);
}

// A router's directory may lack the weights, or some of them.
TEST_F(ModelDigestTest, MissingWeightsAreNotFound) {
  EXPECT_TRUE(absl::IsNotFound(CheckpointDigest(dir_).status()));
  Write("model.safetensors.index.json", R"({"weight_map":{"a":"one","b":"two"}})");
  Write("one", Weights('a'));
  EXPECT_TRUE(absl::IsNotFound(CheckpointDigest(dir_).status()));
  Write("two", "\x09\0\0\0\0\0\0\0");
  EXPECT_TRUE(absl::IsInvalidArgument(CheckpointDigest(dir_).status()));
  Write("two", Weights('a'));
  EXPECT_OK(CheckpointDigest(dir_));
}

TEST_F(ModelDigestTest, DummyWeightsAreTheirSeed) {
  EXPECT_EQ(DummyDigest(dir_, 1).value(), DummyDigest(dir_, 1).value());
  EXPECT_NE(DummyDigest(dir_, 1).value(), DummyDigest(dir_, 2).value());
}

}  // namespace
}  // namespace tandem
