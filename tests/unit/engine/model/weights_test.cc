// Loading weights: what is wrong with a checkpoint is said by the tensor's name.
#include <cstring>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/device/cpu/cpu_device.h"
#include "engine/kernels/cpu/cpu_ops.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/model_weights.h"
#include "engine/model/tokenizer_size.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::HasSubstr;

std::string Fixture() { return SourcePath("tests/data/engine/qwen2-gqa"); }

class WeightsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "weights_test_" +
           ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(dir_);
    std::filesystem::copy(Fixture(), dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  std::string ReadWeights() {
    std::ifstream file(dir_ + "/model.safetensors", std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void WriteWeights(const std::string& bytes) {
    std::ofstream(dir_ + "/model.safetensors", std::ios::binary) << bytes;
  }
  // Replaces the first occurrence in the header by text of the same length.
  void Replace(const std::string& from, const std::string& to) {
    ASSERT_EQ(from.size(), to.size());
    std::string bytes = ReadWeights();
    const size_t at = bytes.find(from);
    ASSERT_NE(at, std::string::npos);
    WriteWeights(bytes.replace(at, from.size(), to));
  }
  absl::StatusOr<ModelWeights> Load(bool dummy = false, uint64_t seed = 0) {
    return LoadFrom(dir_, dummy, seed);
  }
  absl::StatusOr<ModelWeights> LoadFrom(const std::string& dir, bool dummy = false,
                                        uint64_t seed = 0) {
    const auto config = ModelConfig::Load(dir);
    if (!config.ok()) return config.status();
    return LoadModelWeights(*config, {dir, dummy, seed, Element::kFloat32, /*num_threads=*/2},
                            &device_, &ops_);
  }

  std::string dir_;
  CpuDevice device_{{.num_threads = 2}};
  CpuOps ops_{OpsShape{}, Buffer(), &device_.threads()};  // only packs
};

TEST_F(WeightsTest, NamesWhatDoesNotFit) {
  EXPECT_OK(Load());
  Replace("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.uq_proj.weight");
  EXPECT_THAT(Load().status().ToString(),
              HasSubstr("\"model.layers.1.mlp.up_proj.weight\" is missing"));
  Replace("model.layers.1.mlp.uq_proj.weight", "model.layers.1.mlp.up_proj.weight");
  Replace("[160,48]", "[48,160]");
  EXPECT_THAT(Load().status().ToString(), HasSubstr("has shape [48, 160], config.json implies"));
}

TEST_F(WeightsTest, RefusesATensorThatTheModelDoesNotHave) {
  std::ifstream file(dir_ + "/config.json");
  std::string config{std::istreambuf_iterator<char>(file), {}};
  const size_t at = config.find("\"num_hidden_layers\": 2");
  ASSERT_NE(at, std::string::npos);
  config.replace(at, 22, "\"num_hidden_layers\": 1");
  std::ofstream(dir_ + "/config.json") << config;
  EXPECT_THAT(Load().status().ToString(), HasSubstr("\"model.layers.1."));
  EXPECT_THAT(Load().status().ToString(), HasSubstr("not part of"));
}

TEST_F(WeightsTest, BiasesAndNormsAreWhereTheDescriptionSays) {
  const auto load = [this](const std::string& name) {
    return LoadFrom(SourcePath("tests/data/engine/" + name));
  };
  const auto llama = load("llama-biases");  // names without "model."
  ASSERT_OK(llama);
  EXPECT_EQ(llama->layers[1].qkv.bias.size(), 144u);
  EXPECT_EQ(llama->layers[1].output.bias.size(), 48u);
  EXPECT_EQ(llama->layers[1].gate_up.bias.size(), 104u);
  EXPECT_EQ(llama->layers[1].down.bias.size(), 48u);
  EXPECT_TRUE(llama->layers[1].q_norm.data() == nullptr);
  const auto qwen3 = load("qwen3-gqa");
  ASSERT_OK(qwen3);
  EXPECT_TRUE(qwen3->layers[2].qkv.bias.data() == nullptr);
  EXPECT_EQ(qwen3->layers[2].q_norm.size(), 32u);
  EXPECT_EQ(qwen3->layers[2].k_norm.size(), 32u);
}

TEST_F(WeightsTest, AMissingHeadIsToldHowToTieIt) {
  Replace("lm_head.weight", "lm_haed.weight");
  EXPECT_THAT(Load().status().ToString(), HasSubstr("\"tie_word_embeddings\": true"));
}

TEST_F(WeightsTest, TruncatedFileIsAnError) {
  const std::string bytes = ReadWeights();
  WriteWeights(bytes.substr(0, bytes.size() - 2));
  EXPECT_THAT(Load().status().ToString(), HasSubstr("model.safetensors"));
  WriteWeights("");
  EXPECT_THAT(Load().status().ToString(), HasSubstr("truncated"));
}

TEST_F(WeightsTest, DummyNeedsNoCheckpointAndDependsOnTheSeedAlone) {
  std::filesystem::remove(dir_ + "/model.safetensors");
  const auto a = Load(true, 1), b = Load(true, 1), c = Load(true, 2);
  ASSERT_OK(a);
  ASSERT_OK(b);
  ASSERT_OK(c);
  const auto same = [](const ModelWeights& x, const ModelWeights& y) {
    return std::memcmp(x.head.memory.data(), y.head.memory.data(), x.head.memory.size()) == 0;
  };
  EXPECT_TRUE(same(*a, *b));
  EXPECT_FALSE(same(*a, *c));
  EXPECT_EQ(a->digest, b->digest);
  EXPECT_NE(a->digest, c->digest);
  EXPECT_EQ(a->layers[0].input_norm.data()[3], 1.0f);
}

TEST_F(WeightsTest, DigestChangesWithTheData) {
  const auto before = Load();
  ASSERT_OK(before);
  EXPECT_EQ(before->digest.size(), 32u);
  std::string bytes = ReadWeights();
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  WriteWeights(bytes);
  const auto after = Load();
  ASSERT_OK(after);
  EXPECT_NE(before->digest, after->digest);
}

TEST_F(WeightsTest, TokenizerSizeIsTheLargestIdPlusOne) {
  const auto size_of = [&](const std::string& json) {
    std::ofstream(dir_ + "/tokenizer.json") << json;
    return TokenizerVocabSize(dir_);
  };
  EXPECT_EQ(TokenizerVocabSize(dir_).value(), 0);
  EXPECT_EQ(size_of(R"({"model":{"vocab":{"a":0,"b":7},"merges":["a b"]},)"
                    R"("added_tokens":[{"id":9,"content":"<x>"}]})")
                .value(),
            10);
  EXPECT_EQ(size_of(R"({"model":{"vocab":{"a":0,"b":7}}})").value(), 8);
  EXPECT_FALSE(size_of("{").ok());
  EXPECT_FALSE(size_of(R"({"model":{"vocab":{"a":-1}}})").ok());
  EXPECT_FALSE(size_of(R"({"model":{"vocab":{"a":"0"}}})").ok());
}

TEST(MappedFileTest, RefusesWhatIsNoFile) {
  EXPECT_EQ(MappedFile::Open("/no/such/file").status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(MappedFile::Open("/tmp").ok());
}

}  // namespace
}  // namespace tandem::engine
