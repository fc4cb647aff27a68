// How an engine on a card shares out its memory, what it refuses, and how it ends when the card
// fails.
#include <algorithm>
#include <cstdlib>
#include <cuda_runtime.h>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <unistd.h>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/device/cuda/cuda_check.h"
#include "engine/runtime/backend.h"
#include "engine/runtime/engine.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr double kGiB = 1024.0 * 1024 * 1024;

class CudaMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto backend = OpenBackend("cuda", {});
    if (!backend.ok()) GTEST_SKIP() << backend.status().ToString();
    total_ = static_cast<double>((*backend)->device().TotalMemory());
    folder_ =
        std::filesystem::temp_directory_path() / ("tandem-memory-" + std::to_string(getpid()));
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override {
    if (!folder_.empty()) std::filesystem::remove_all(folder_);
  }

  // Qwen1.5-7B with some of its layers: 16 KiB of KV a token and layer.
  EngineOptions Qwen15(int layers) {
    std::ofstream(folder_ / "config.json")
        << R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 4096,
               "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
               "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
               "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": false,
               "num_hidden_layers": )"
        << layers << "}";
    EngineOptions options;
    options.model_dir = folder_;
    options.load_format = "dummy";
    options.device = "cuda";
    return options;
  }
  EngineOptions Small() {
    EngineOptions options;
    options.model_dir = SourcePath("tests/data/models/slow");
    options.load_format = "dummy";
    options.device = "cuda";
    options.gpu_memory_utilization = 0.2;
    return options;
  }
  static double UsedBytes() {
    size_t available = 0, total = 0;
    EXPECT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
    return static_cast<double>(total - available);
  }

  std::filesystem::path folder_;
  double total_ = 0;
};

std::string ErrorOf(const EngineOptions& options) {
  return Engine::Load(options).status().ToString();
}

// Draws `count` tokens greedily, a step each.
std::vector<int32_t> Greedy(Engine* engine, std::vector<int32_t> tokens, int count) {
  SamplingParams greedy;
  greedy.temperature = 0;
  std::vector<int32_t> blocks(64), out;
  std::iota(blocks.begin(), blocks.end(), 3);
  const int prompt = static_cast<int>(tokens.size());
  for (int start = 0; count > 0; --count) {
    Batch batch;
    batch.items.push_back(
        {tokens, start, static_cast<int>(tokens.size()) - start, prompt, blocks, &greedy, -1});
    const auto output = engine->runner().Run(batch);
    if (!output.ok() || !output->items[0].has_token) {
      ADD_FAILURE() << output.status();
      return out;
    }
    start = static_cast<int>(tokens.size());
    tokens.push_back(output->items[0].token.token);
    out.push_back(tokens.back());
  }
  return out;
}

TEST_F(CudaMemoryTest, ThePoolFillsTheUtilization) {
  const double before = UsedBytes();
  const auto engine = Engine::Load(Small());
  ASSERT_OK(engine);
  std::printf("%s\n", (*engine)->Banner().c_str());
  const EngineOptions& options = (*engine)->options();
  EXPECT_EQ(options.device, "cuda");
  EXPECT_EQ(options.dtype, "bfloat16");
  EXPECT_EQ(options.max_num_batched_tokens, 8192);
  EXPECT_EQ(options.max_num_seqs, 256);
  const KvRegion region = (*engine)->region();
  EXPECT_EQ(region.memory, KvMemoryKind::kDevice);
  EXPECT_GE(region.fd, 0);
  EXPECT_EQ(region.TotalBytes(), static_cast<size_t>(options.kv_cache_memory_bytes));
  // Not more than allowed, and less by the reserve and what trial steps took.
  EXPECT_LT(UsedBytes() - before, 0.2 * total_);
  EXPECT_GT(UsedBytes() - before, 0.2 * total_ - kGiB);
}

TEST_F(CudaMemoryTest, AnEngineThatEndsGivesItsMemoryBack) {
  { ASSERT_OK(Engine::Load(Small())); }
  const double before = UsedBytes();
  for (int i = 0; i < 3; ++i) {
    ASSERT_OK(Engine::Load(Small()));
  }
  EXPECT_NEAR(UsedBytes(), before, 0.03 * kGiB);
}

TEST_F(CudaMemoryTest, APoolOfAGivenSize) {
  EngineOptions options = Small();
  options.kv_cache_memory_bytes = int64_t{1} << 30;
  const auto engine = Engine::Load(options);
  ASSERT_OK(engine);
  EXPECT_NEAR(static_cast<double>((*engine)->region().TotalBytes()), kGiB, 0.01 * kGiB);
  // Deterministic, and the same in another engine.
  const std::vector<int32_t> tokens = Greedy(engine->get(), {5, 6, 7, 8}, 8);
  EXPECT_EQ(Greedy(engine->get(), {5, 6, 7, 8}, 8), tokens);
  options.kv_cache_memory_bytes = static_cast<int64_t>(total_);
  EXPECT_THAT(ErrorOf(options),
              AllOf(HasSubstr("RESOURCE_EXHAUSTED"), HasSubstr("--kv-cache-memory-bytes"),
                    HasSubstr("does not fit")));
}

TEST_F(CudaMemoryTest, RanksOnOneCardShareItsUtilization) {
  EngineOptions options = Small();
  options.tensor_parallel_size = 2;
  options.devices = "0,0";
  const double before = UsedBytes();
  {
    const auto engine = Engine::Load(options);
    ASSERT_OK(engine);
    EXPECT_LT(UsedBytes() - before, 0.2 * total_);
    EXPECT_GT(UsedBytes() - before, 0.2 * total_ - 2 * kGiB);
    const auto regions = (*engine)->regions();
    ASSERT_EQ(regions.size(), 2u);
    EXPECT_NEAR(static_cast<double>(regions[0].TotalBytes()),
                static_cast<double>(regions[1].TotalBytes()), 0.05 * kGiB);
    EXPECT_EQ((*engine)->options().kv_cache_memory_bytes,
              static_cast<int64_t>((*engine)->region().TotalBytes()));
  }
  // A size that is given is that of all pieces.
  options.kv_cache_memory_bytes = int64_t{1} << 30;
  const auto engine = Engine::Load(options);
  ASSERT_OK(engine);
  EXPECT_NEAR(static_cast<double>((*engine)->region().TotalBytes()), kGiB, 0.01 * kGiB);
}

// 512 KiB of KV a token. Nothing is loaded for this answer.
TEST_F(CudaMemoryTest, ALengthThatCannotFitIsRefusedBeforeTheWeightsAreRead) {
  EngineOptions options = Qwen15(32);
  options.max_model_len = 32768;
  options.gpu_memory_utilization = std::min(1.0, 23 * kGiB / total_);
  const absl::Time begin = absl::Now();
  const std::string error = ErrorOf(options);
  std::printf("%.0f ms: %s\n", absl::ToDoubleMilliseconds(absl::Now() - begin), error.c_str());
  EXPECT_THAT(error,
              AllOf(HasSubstr("--max-model-len=32768 does not fit"), HasSubstr("512 KiB a token"),
                    HasSubstr("the largest that would fit is")));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
}

TEST_F(CudaMemoryTest, TheLargestLengthThatIsNamedFits) {
  EngineOptions options = Qwen15(2);
  options.max_num_batched_tokens = 1024;
  options.gpu_memory_utilization = std::min(1.0, 7 * kGiB / total_);
  const auto engine = Engine::Load(options);  // as long as fits
  ASSERT_OK(engine);
  std::printf("%s\n", (*engine)->Banner().c_str());
}

TEST_F(CudaMemoryTest, ACardThatOthersFillIsRefusedWithFigures) {
  size_t available = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
  void* taken = nullptr;
  ASSERT_EQ(cudaMalloc(&taken, available - (size_t{6} << 30)), cudaSuccess);
  EngineOptions options = Qwen15(32);
  options.gpu_memory_utilization = 0.9;
  const std::string error = ErrorOf(options);
  std::printf("%s\n", error.c_str());
  EXPECT_THAT(error, AllOf(HasSubstr("RESOURCE_EXHAUSTED"), HasSubstr("other processes use"),
                           HasSubstr("--gpu-memory-utilization=0.90 wants")));
  options.gpu_memory_utilization = 0.03;
  const std::string small = ErrorOf(options);
  std::printf("%s\n", small.c_str());
  EXPECT_THAT(small, AllOf(HasSubstr("RESOURCE_EXHAUSTED"), HasSubstr("no room for a KV pool"),
                           HasSubstr("end the other processes on the card")));
  // Not even room for the scratch memory of a step.
  options.max_num_batched_tokens = 1 << 18;
  const std::string scratch = ErrorOf(options);
  std::printf("%s\n", scratch.c_str());
  EXPECT_THAT(scratch, HasSubstr("RESOURCE_EXHAUSTED"));
  ASSERT_EQ(cudaFree(taken), cudaSuccess);
}

TEST_F(CudaMemoryTest, ACardThatThereIsNotIsRefusedAlsoByAuto) {
  EngineOptions options = Small();
  options.gpu = 99;
  EXPECT_THAT(ErrorOf(options), HasSubstr("--device=cuda: GPU 99: this process sees "));
  options.device = "auto";
  EXPECT_THAT(ErrorOf(options), HasSubstr("--device=cuda: GPU 99: this process sees "));
}

TEST_F(CudaMemoryTest, Float32IsRefused) {
  EngineOptions options = Small();
  options.dtype = "float32";
  EXPECT_THAT(ErrorOf(options), HasSubstr("--device=cuda computes in bfloat16 only"));
}

TEST_F(CudaMemoryTest, AFaultEndsTheProcessInItsStep) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EngineOptions options = Small();
  options.kv_cache_memory_bytes = int64_t{1} << 28;
  EXPECT_EXIT(
      {
        setenv("TANDEM_CUDA_FAULT_STEP", "5", 1);
        const auto engine = Engine::Load(options);
        Greedy(engine->get(), {5, 6, 7, 8}, 8);
      },
      ::testing::ExitedWithCode(cuda::kCudaErrorExit), "injected fault.*step 5");
}

}  // namespace
}  // namespace tandem::engine
