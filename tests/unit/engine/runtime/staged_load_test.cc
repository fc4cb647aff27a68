// Weights that are staged to a device with memory of its own are those that a CPU loads.
#include <cstring>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/model/load_progress.h"
#include "engine/model/model_weights.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/decoder_runner.h"
#include "tests/fakes/deferred_backend.h"
#include "tests/support/paths.h"
#include "tests/support/same_weights.h"

namespace tandem::engine {
namespace {

using ::testing::HasSubstr;

struct Loaded {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Ops> ops;
  absl::StatusOr<ModelWeights> weights;
};

Loaded Load(std::unique_ptr<Backend> backend, const std::string& dir, bool dummy, Element element,
            bool fp8 = false) {
  Loaded loaded{std::move(backend), nullptr, absl::UnknownError("")};
  const ModelConfig config = ModelConfig::Load(dir).value();
  loaded.ops = loaded.backend->MakeOps(OpsShapeOf(config, element, {16, 16, 16})).value();
  LoadOptions options{dir, dummy, 3, element, /*num_threads=*/2};
  options.fp8 = fp8;
  loaded.weights = LoadModelWeights(config, options, &loaded.backend->device(), loaded.ops.get());
  return loaded;
}

std::unique_ptr<Backend> Deferred() {
  return MakeDeferredBackend([] { return absl::ZeroDuration(); });
}

TEST(StagedLoad, IsTheCpusLoad) {
  for (const std::string name : {"llama-biases", "qwen2-yarn-tied", "qwen3-gqa"}) {
    SCOPED_TRACE(name);
    const std::string dir = SourcePath("tests/data/engine/" + name);
    for (const bool dummy : {false, true}) {
      for (const Element element : {Element::kFloat32, Element::kBFloat16}) {
        const Loaded cpu =
            Load(OpenBackend("cpu", {.num_threads = 2}).value(), dir, dummy, element);
        const Loaded staged = Load(Deferred(), dir, dummy, element);
        ASSERT_OK(cpu.weights);
        ASSERT_OK(staged.weights);
        ExpectSame(*staged.weights, *cpu.weights);
      }
    }
  }
}

// Dequantised by the threads that stage.
TEST(StagedLoad, OfQuantisedLayersToo) {
  for (const std::string name : {"gptq", "awq"}) {
    SCOPED_TRACE(name);
    const std::string dir = SourcePath("tests/data/quantised/" + name);
    const Loaded cpu =
        Load(OpenBackend("cpu", {.num_threads = 2}).value(), dir, false, Element::kBFloat16);
    const Loaded staged = Load(Deferred(), dir, false, Element::kBFloat16);
    ASSERT_OK(cpu.weights);
    ASSERT_OK(staged.weights);
    ExpectSame(*staged.weights, *cpu.weights);
  }
}

TEST(StagedLoad, OfWeightsThatAreRoundedToo) {
  const std::string dir = SourcePath("tests/data/engine/qwen2-yarn-tied");
  for (const bool dummy : {false, true}) {
    const Loaded plain =
        Load(OpenBackend("cpu", {.num_threads = 2}).value(), dir, dummy, Element::kBFloat16);
    const Loaded cpu =
        Load(OpenBackend("cpu", {.num_threads = 2}).value(), dir, dummy, Element::kBFloat16, true);
    const Loaded staged = Load(Deferred(), dir, dummy, Element::kBFloat16, true);
    ASSERT_OK(plain.weights);
    ASSERT_OK(cpu.weights);
    ASSERT_OK(staged.weights);
    ExpectSame(*staged.weights, *cpu.weights);
    for (const auto part :
         {&LayerWeights::qkv, &LayerWeights::output, &LayerWeights::gate_up, &LayerWeights::down}) {
      EXPECT_FALSE(Same(plain.weights->layers[1].*part, cpu.weights->layers[1].*part));
    }
    EXPECT_TRUE(Same(plain.weights->head, cpu.weights->head));
  }
}

// Of many pieces and several threads.
TEST(StagedLoad, TheDemoModelToo) {
  const std::string dir = SourcePath("models/demo");
  const Loaded cpu =
      Load(OpenBackend("cpu", {.num_threads = 2}).value(), dir, false, Element::kFloat32);
  const Loaded staged = Load(Deferred(), dir, false, Element::kFloat32);
  ASSERT_OK(cpu.weights);
  ASSERT_OK(staged.weights);
  ExpectSame(*staged.weights, *cpu.weights);
}

TEST(StagedLoad, AFileThatCannotBeReadIsNamed) {
  const auto file = MappedFile::Open(SourcePath("models/demo/config.json"));
  ASSERT_OK(file.status());
  std::vector<std::byte> bytes(file->bytes().size());
  EXPECT_OK(file->Read(0, bytes));
  EXPECT_EQ(std::memcmp(bytes.data(), file->bytes().data(), bytes.size()), 0);
  const absl::Status status = file->Read(1, bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(status.ToString(), HasSubstr("config.json: cannot be read at byte"));
}

TEST(LoadProgress, SaysHowFarAndHowFast) {
  EXPECT_EQ(ProgressText(0, 2'000'000'000, absl::ZeroDuration(), 10),
            "[>         ]   0 %, 0.0 of 2.0 GB, 0.0 GB/s");
  EXPECT_EQ(ProgressText(500'000'000, 2'000'000'000, absl::Seconds(2), 8),
            "[==>     ]  25 %, 0.5 of 2.0 GB, 0.2 GB/s, 6.0 s left");
  EXPECT_EQ(ProgressText(2'000'000'000, 2'000'000'000, absl::Seconds(1), 4),
            "[====] 100 %, 2.0 of 2.0 GB, 2.0 GB/s");
  EXPECT_EQ(ProgressText(0, 0, absl::Seconds(1), 4), "[====] 100 %, 0.0 of 0.0 GB, 0.0 GB/s");
}

}  // namespace
}  // namespace tandem::engine
