// 4-bit layers as AutoGPTQ and AutoAWQ pack them stand for what they were packed from, and models
// of them load as if they had never been quantised. scripts/make_quantised_fixtures.py makes the
// files.
#include "engine/model/quantised_linear.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/model_config.h"
#include "engine/device/cpu/cpu_device.h"
#include "engine/kernels/cpu/cpu_ops.h"
#include "engine/kernels/int4_rows.h"
#include "engine/model/model_weights.h"
#include "tests/support/paths.h"
#include "tests/support/temp_dir.h"

namespace tandem::engine {
namespace {

using ::testing::HasSubstr;

std::string Fixture(const std::string& name) { return SourcePath("tests/data/quantised/" + name); }

// From a name like "gptq-sym-64-act-v2"; "all" is one group.
CheckpointQuantisation DescriptionOf(const std::string& name) {
  CheckpointQuantisation out;
  const bool awq = name.starts_with("awq");
  out.method = awq ? CheckpointQuantisation::Method::kAwq : CheckpointQuantisation::Method::kGptq;
  out.symmetric = name.find("-sym-") != std::string::npos;
  out.act_order = name.find("-act-") != std::string::npos;
  out.zeros_less_one = name.ends_with("-v1");
  out.group_size = -1;
  for (const int size : {32, 64, 128}) {
    if (name.find("-" + std::to_string(size) + "-") != std::string::npos) out.group_size = size;
  }
  return out;
}

class QuantisedLayersTest : public ::testing::Test {
 protected:
  struct Layer {
    TensorView expected;
    QuantisedLinear linear;
  };
  Layer Open(const std::string& name, const CheckpointQuantisation& quantisation) const {
    const TensorView expected = checkpoint_.Get(name + ".expected").value();
    return {expected, QuantisedLinear::Open(checkpoint_, name, quantisation, expected.shape[0],
                                            expected.shape[1])
                          .value()};
  }
  // Of all weights, dequantised some rows at a time: |read - expected| / |expected|.
  static double Error(const Layer& layer, size_t rows_at_once) {
    const size_t rows = layer.linear.outputs(), k = layer.linear.inputs();
    std::vector<float> read(rows * k);
    for (size_t row = 0; row < rows; row += rows_at_once) {
      layer.linear.Dequantise(row, std::min(rows_at_once, rows - row), read.data() + row * k);
    }
    double difference = 0, norm = 0;
    for (size_t i = 0; i < read.size(); ++i) {
      const double expected = LoadElement(layer.expected.data, layer.expected.element, i);
      difference += (read[i] - expected) * (read[i] - expected);
      norm += expected * expected;
    }
    return std::sqrt(difference / norm);
  }

  const Checkpoint checkpoint_ = Checkpoint::Open(Fixture("layers")).value();
};

TEST_F(QuantisedLayersTest, StandForWhatTheyWerePackedFrom) {
  int layers = 0;
  for (const std::string& tensor : checkpoint_.Names()) {
    if (!tensor.ends_with(".expected")) continue;
    const std::string name = tensor.substr(0, tensor.find('.'));
    ++layers;
    const Layer layer = Open(name, DescriptionOf(name));
    EXPECT_EQ(Error(layer, layer.linear.outputs()), 0) << name;
    EXPECT_EQ(Error(layer, 5), 0) << name;
  }
  // GPTQ: symmetric or not, four group sizes, act-order or not, v1 or v2, and one zero point of 0
  // in v1; AWQ: four group sizes.
  EXPECT_EQ(layers, 2 * 4 * 2 * 2 + 1 + 4);
}

// As a device gets them that reads 4 bits: the same weights, with the inputs of a group side by
// side.
TEST_F(QuantisedLayersTest, PackedRowsStandForTheSame) {
  for (const std::string& tensor : checkpoint_.Names()) {
    if (!tensor.ends_with(".expected")) continue;
    const std::string name = tensor.substr(0, tensor.find('.'));
    SCOPED_TRACE(name);
    const Layer layer = Open(name, DescriptionOf(name));
    const size_t rows = layer.linear.outputs(), k = layer.linear.inputs();
    const Int4Shape shape{Int4Pairs::kRows, rows, k, layer.linear.group_size()};
    const std::optional<std::vector<int32_t>> order = layer.linear.Order();
    ASSERT_TRUE(order.has_value());
    EXPECT_EQ(order->empty(), name.find("-act-") == std::string::npos || shape.groups() == 1);
    std::vector<uint32_t> values(rows * shape.words()), scales(rows * shape.groups());
    for (size_t row = 0; row < rows; row += 5) {
      layer.linear.PackRows(row, std::min<size_t>(5, rows - row), *order,
                            values.data() + row * shape.words(),
                            scales.data() + row * shape.groups());
    }
    for (size_t row = 0; row < rows; ++row) {
      for (size_t j = 0; j < k; ++j) {
        const uint32_t scale = scales[row * shape.groups() + j / shape.group_size];
        const auto value =
            static_cast<float>(values[row * shape.words() + j / 8] >> (4 * (j % 8)) & 15);
        const size_t input = order->empty() ? j : static_cast<size_t>((*order)[j]);
        ASSERT_EQ(std::bit_cast<float>(scale & ~15u) * (value - static_cast<float>(scale & 15)),
                  LoadElement(layer.expected.data, layer.expected.element, row * k + input));
      }
    }
  }
}

// Tools have written both formats under both names; zero points of 8 everywhere tell.
TEST_F(QuantisedLayersTest, SymmetricOnesAreReadWhateverFormatTheirConfigNames) {
  for (const std::string name : {"gptq-sym-64-act-v1", "gptq-sym-64-act-v2"}) {
    CheckpointQuantisation wrong = DescriptionOf(name);
    wrong.zeros_less_one = !wrong.zeros_less_one;
    EXPECT_EQ(Error(Open(name, wrong), 16), 0) << name;
  }
  CheckpointQuantisation wrong = DescriptionOf("gptq-asym-64-act-v1");
  wrong.zeros_less_one = false;
  EXPECT_GT(Error(Open("gptq-asym-64-act-v1", wrong), 16), 0.05);
}

TEST_F(QuantisedLayersTest, NameTheTensorThatDoesNotFit) {
  const auto error = [this](const std::string& layer, int group_size, int64_t outputs,
                            int64_t inputs) {
    CheckpointQuantisation quantisation = DescriptionOf(layer);
    quantisation.group_size = group_size;
    return QuantisedLinear::Open(checkpoint_, layer, quantisation, outputs, inputs)
        .status()
        .ToString();
  };
  const std::string gptq = "gptq-sym-64-act-v1", awq = "awq-asym-64-plain-v2";
  EXPECT_THAT(error(gptq, 64, 16, 128),
              HasSubstr("\"gptq-sym-64-act-v1.qweight\" has shape [32, 16], config.json and its "
                        "quantisation imply [16, 16]"));
  EXPECT_THAT(error(gptq, 128, 16, 256), HasSubstr("v1.qzeros\" has shape [4, 2]"));
  EXPECT_THAT(error(awq, 64, 24, 256), HasSubstr("v2.qweight\" has shape [256, 2]"));
  EXPECT_THAT(error(awq, 64, 17, 256), HasSubstr("not packed by eight"));
  EXPECT_THAT(error("gptq-other-64-act-v1", 64, 16, 256), HasSubstr("qweight\" is missing"));
}

// A copy of a tiny quantised model.
class QuantisedModelTest : public ::testing::Test {
 protected:
  void Copy(const std::string& name) {
    std::filesystem::copy(Fixture(name), dir_.path(),
                          std::filesystem::copy_options::recursive |
                              std::filesystem::copy_options::overwrite_existing);
  }
  std::string Path(const std::string& file) const { return dir_.path() + "/" + file; }
  absl::StatusOr<ModelWeights> Load(const std::string& dir) {
    const auto config = ModelConfig::Load(dir);
    if (!config.ok()) return config.status();
    return LoadModelWeights(*config, {dir, false, 0, Element::kFloat32, /*num_threads=*/2},
                            &device_, &ops_);
  }
  std::string Error() { return Load(dir_.path()).status().ToString(); }
  // Replaces the first occurrence in the weights by text of the same length.
  void Replace(const std::string& from, const std::string& to) {
    ASSERT_EQ(from.size(), to.size());
    std::string bytes = ReadWholeFile(Path("model.safetensors"));
    const size_t at = bytes.find(from);
    ASSERT_NE(at, std::string::npos);
    WriteFile(Path("model.safetensors"), bytes.replace(at, from.size(), to));
  }

  const TempDir dir_;
  CpuDevice device_{{.num_threads = 2}};
  CpuOps ops_{OpsShape{}, Buffer(), &device_.threads()};  // only packs
};

TEST_F(QuantisedModelTest, LoadsAsIfItHadNeverBeenQuantised) {
  const auto same = [](const LinearWeights& a, const LinearWeights& b) {
    return a.memory.size() == b.memory.size() &&
           std::memcmp(a.memory.data(), b.memory.data(), a.memory.size()) == 0;
  };
  // AutoGPTQ's own file, act-order, empty biases; AWQ in config.json.
  for (const std::string name : {"gptq", "awq"}) {
    SCOPED_TRACE(name);
    const auto quantised = Load(Fixture(name)), plain = Load(Fixture(name + "-plain"));
    ASSERT_OK(quantised);
    ASSERT_OK(plain);
    ASSERT_EQ(quantised->layers.size(), 2u);
    for (size_t i = 0; i < 2; ++i) {
      const LayerWeights &a = quantised->layers[i], &b = plain->layers[i];
      EXPECT_TRUE(same(a.qkv, b.qkv) && same(a.output, b.output)) << i;
      EXPECT_TRUE(same(a.gate_up, b.gate_up) && same(a.down, b.down)) << i;
      EXPECT_EQ(a.qkv.bias.size(), 96u);
      EXPECT_EQ(a.output.bias.data(), nullptr);
    }
    EXPECT_TRUE(same(quantised->head, plain->head));
    EXPECT_NE(quantised->digest, plain->digest);
  }
}

TEST_F(QuantisedModelTest, SaysWhatIsMissing) {
  Copy("gptq");
  EXPECT_OK(Load(dir_.path()));
  std::filesystem::remove(Path("quantize_config.json"));
  EXPECT_THAT(Error(), HasSubstr("self_attn.q_proj.qweight\" is quantised, and neither"));
  Copy("gptq");
  Replace("model.layers.1.mlp.up_proj.scales", "model.layers.1.mlp.up_proj.scalez");
  EXPECT_THAT(Error(), HasSubstr("\"model.layers.1.mlp.up_proj.scales\" is missing"));
  Replace("model.layers.1.mlp.up_proj.scalez", "model.layers.1.mlp.up_proj.scales");
  Replace("\"I32\"", "\"U32\"");
  EXPECT_THAT(Error(), HasSubstr("dtype U32, must be I32"));
}

TEST_F(QuantisedModelTest, ABiasThatTheModelLacksMustBeEmpty) {
  Copy("gptq");
  std::string bytes = ReadWholeFile(Path("model.safetensors"));
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_OK(checkpoint);
  const TensorView bias = checkpoint->Get("model.layers.1.mlp.down_proj.bias").value();
  bytes[bias.FileOffset() + 3] = 0x3c;
  WriteFile(Path("model.safetensors"), bytes);
  EXPECT_THAT(Error(), HasSubstr("\"model.layers.1.mlp.down_proj.bias\" is not part of"));
}

TEST_F(QuantisedModelTest, AGroupThatDoesNotExistIsRefused) {
  Copy("gptq");
  std::string bytes = ReadWholeFile(Path("model.safetensors"));
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_OK(checkpoint);
  const auto groups = checkpoint->GetInts("model.layers.0.mlp.down_proj.g_idx");
  ASSERT_OK(groups);
  const std::byte* begin = checkpoint->files()[0].mapping.bytes().data();
  bytes[static_cast<size_t>(groups->data - begin) + 4 * 7] = 2;
  WriteFile(Path("model.safetensors"), bytes);
  EXPECT_THAT(Error(), HasSubstr("down_proj.g_idx\": group 2 of input 7 is not below 2"));
}

}  // namespace
}  // namespace tandem::engine
