#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/runtime/backend.h"
#include "engine/runtime/engine.h"
#include "engine/runtime/engine_flags.h"
#include "engine/runtime/tensor_parallel.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

EngineOptions Options() {
  EngineOptions options;
  options.device = "cpu";
  options.model_dir = SourcePath("tests/data/engine/qwen2-gqa");
  options.device = "cpu";
  options.dtype = "float32";
  options.max_num_batched_tokens = 64;
  options.max_num_seqs = 4;
  options.kv_cache_memory_bytes = 1 << 20;
  return options;
}

std::string ErrorOf(const EngineOptions& options) {
  return Engine::Load(options).status().ToString();
}

TEST(EngineLoadTest, ResolvesWhatWasLeftOpen) {
  EngineOptions options = Options();
  options.kv_cache_memory_bytes = 0;
  options.dtype = "auto";
  const auto engine = Engine::Load(options);
  ASSERT_OK(engine);
  const EngineOptions& resolved = (*engine)->options();
  EXPECT_EQ(resolved.max_model_len, 1024);
  EXPECT_THAT(resolved.dtype, ::testing::AnyOf("float32", "bfloat16"));
  EXPECT_GT(resolved.num_threads, 0);
  EXPECT_EQ(resolved.valid_vocab_size, 160);
  const KvRegion region = (*engine)->region();
  EXPECT_EQ(region.num_blocks, 4 * 1024 / 16);  // every sequence at full length
  EXPECT_EQ(region.TotalBytes(), static_cast<size_t>(resolved.kv_cache_memory_bytes));
  EXPECT_EQ((*engine)->pool().NumAvailable(), region.num_blocks);
  EXPECT_THAT((*engine)->Banner(), HasSubstr("max_model_len 1024, 4.0 sequences"));
}

TEST(EngineLoadTest, TheSizeOfAStepHasTheDevicesDefaults) {
  EngineOptions options = Options();
  options.max_num_batched_tokens = options.max_num_seqs = 0;
  auto engine = Engine::Load(options);
  ASSERT_OK(engine);
  EXPECT_EQ((*engine)->options().max_num_batched_tokens, 512);
  EXPECT_EQ((*engine)->options().max_num_seqs, 64);
  // Where one is given the other never contradicts it.
  options.max_num_batched_tokens = 16;
  engine = Engine::Load(options);
  ASSERT_OK(engine);
  EXPECT_EQ((*engine)->options().max_num_seqs, 16);
  options.max_num_batched_tokens = 0;
  options.max_num_seqs = 700;
  engine = Engine::Load(options);
  ASSERT_OK(engine);
  EXPECT_EQ((*engine)->options().max_num_batched_tokens, 700);
}

TEST(EngineLoadTest, KvInFp8HoldsFourTimesTheTokensOfFloat32) {
  EngineOptions options = Options();
  const auto plain = Engine::Load(options);
  ASSERT_OK(plain);
  EXPECT_EQ((*plain)->options().kv_cache_dtype, "float32");
  options.kv_cache_dtype = "fp8";
  const auto fp8 = Engine::Load(options);
  ASSERT_OK(fp8);
  EXPECT_EQ((*fp8)->options().kv_cache_dtype, "fp8");
  EXPECT_EQ((*fp8)->options().dtype, "float32");
  EXPECT_EQ((*fp8)->region().num_blocks, 4 * (*plain)->region().num_blocks);
  EXPECT_EQ((*fp8)->region().TotalBytes(), (*plain)->region().TotalBytes());
  EXPECT_THAT((*fp8)->Banner(), HasSubstr("64 bytes per token (fp8)"));
  options.dtype = "bfloat16";  // float32 where the CPU has no other
  options.kv_cache_dtype = "auto";
  const auto half = Engine::Load(options);
  ASSERT_OK(half);
  const int share = (*half)->options().dtype == "bfloat16" ? 2 : 4;
  EXPECT_EQ((*half)->options().kv_cache_dtype, (*half)->options().dtype);
  EXPECT_EQ((*fp8)->region().num_blocks, share * (*half)->region().num_blocks);
}

TEST(EngineLoadTest, QuantizationIsTheCheckpointsUnlessItIsMade) {
  EngineOptions options = Options();
  const auto plain = Engine::Load(options);
  ASSERT_OK(plain);
  EXPECT_EQ((*plain)->options().quantization, "none");
  options.quantization = "fp8";
  const auto fp8 = Engine::Load(options);
  ASSERT_OK(fp8);
  EXPECT_EQ((*fp8)->options().quantization, "fp8");
  EXPECT_EQ((*fp8)->model_digest(), (*plain)->model_digest());
  EXPECT_THAT((*fp8)->Banner(), HasSubstr("dtype float32, quantization fp8"));
  options.model_dir = SourcePath("tests/data/quantised/awq");
  EXPECT_THAT(ErrorOf(options),
              AllOf(HasSubstr("--quantization=fp8 is for weights that are not quantised"),
                    HasSubstr("AWQ, 4 bits"), HasSubstr("leave the flag out")));
  options.quantization = "auto";
  const auto awq = Engine::Load(options);
  ASSERT_OK(awq);
  EXPECT_EQ((*awq)->options().quantization, "awq");
}

TEST(EngineLoadTest, RefusesWithFlagLimitAndWhatWouldFit) {
  EngineOptions o = Options();
  o.block_size = 24;
  EXPECT_THAT(ErrorOf(o), HasSubstr("--block-size must be 16, 32, 64, 128 or 256, got 24"));
  o = Options();
  o.max_model_len = 1025;
  EXPECT_THAT(ErrorOf(o), HasSubstr("the largest is 1024"));
  o = Options();
  o.max_model_len = 1000;
  // 2 layers, K and V, one head of 16 float32: 256 bytes per token.
  o.kv_cache_memory_bytes = 256 * 16 * 10 + 100;
  EXPECT_THAT(ErrorOf(o), HasSubstr("the largest that would fit is 160"));
  o.max_model_len = 0;
  const auto engine = Engine::Load(o);
  ASSERT_OK(engine);
  EXPECT_EQ((*engine)->options().max_model_len, 160);
  o.kv_cache_memory_bytes = 4095;
  EXPECT_THAT(ErrorOf(o), HasSubstr("does not hold a single block"));
  o = Options();
  o.dtype = "int3";
  EXPECT_THAT(ErrorOf(o), HasSubstr("--dtype must be"));
  o = Options();
  o.kv_cache_dtype = "fp16";
  EXPECT_THAT(ErrorOf(o), HasSubstr("--kv-cache-dtype must be auto or fp8, got \"fp16\""));
  o = Options();
  o.quantization = "int8";
  EXPECT_THAT(ErrorOf(o), HasSubstr("--quantization must be auto or fp8, got \"int8\""));
  o = Options();
  o.max_num_batched_tokens = 3;
  EXPECT_THAT(ErrorOf(o), HasSubstr("less than --max-num-seqs=4"));
  o = Options();
  o.max_num_seqs = -1;
  EXPECT_THAT(ErrorOf(o), HasSubstr("--max-num-seqs must be in"));
  o = Options();
  o.gpu_memory_utilization = 0;
  EXPECT_THAT(ErrorOf(o), HasSubstr("--gpu-memory-utilization must be in (0, 1], got 0"));
  o = Options();
  o.model_dir = "/no/such/model";
  EXPECT_THAT(ErrorOf(o), HasSubstr("/no/such/model"));
  o = Options();
  o.model_dir = SourcePath("tests/data/quantised/gptq");
  o.pad_query_heads = true;
  EXPECT_THAT(ErrorOf(o), HasSubstr("--pad-query-heads is for weights that are not quantised"));
  o = Options();
  o.tensor_parallel_size = 0;
  EXPECT_THAT(ErrorOf(o), HasSubstr("--tensor-parallel-size must be in [1, 64], got 0"));
  o.tensor_parallel_size = 2;
  EXPECT_THAT(ErrorOf(o),
              HasSubstr("--tensor-parallel-size=2 does not divide the model's KV heads (1)"));
  o = Options();
  o.kv_cache_memory_bytes = int64_t{1} << 49;
  EXPECT_THAT(ErrorOf(o), HasSubstr("--kv-cache-memory-bytes"));
}

// Of ranks that load beside each other some have taken their parts when others look.
TEST(EngineLoadTest, MemoryOfTheHostIsThatBeforeAnyRankTookSome) {
  const auto load = [](size_t left) {
    auto ranks = OpenRanks(Options());
    EXPECT_OK(ranks);
    Rank& rank = ranks->front();
    rank.used_before = rank.backend->device().TotalMemory() - left;
    return LoadRank(Options(), std::move(rank)).status();
  };
  EXPECT_OK(load(size_t{64} << 20));
  EXPECT_THAT(load(1000).ToString(), HasSubstr("weights in float32 take"));
}

TEST(EngineLoadTest, FlagsReachTheOptions) {
  FlagSet flags("test", "");
  EngineOptions options;
  AddEngineFlags(&flags, &options);
  ASSERT_OK(flags.Parse({"--model", "m", "--block-size=32", "--dtype=float32",
                         "--kv-cache-memory-bytes=2MiB", "--no-enable-prefix-caching",
                         "--pad-query-heads", "--kv-cache-dtype=fp8", "--quantization=fp8"}));
  EXPECT_EQ(options.model_dir, "m");
  EXPECT_EQ(options.block_size, 32);
  EXPECT_EQ(options.dtype, "float32");
  EXPECT_EQ(options.kv_cache_dtype, "fp8");
  EXPECT_EQ(options.quantization, "fp8");
  EXPECT_EQ(options.kv_cache_memory_bytes, 2 << 20);
  EXPECT_FALSE(options.enable_prefix_caching);
  EXPECT_TRUE(options.pad_query_heads);
}

TEST(EngineLoadTest, ADeviceThatThisBuildOrThisMachineDoesNotHaveIsRefused) {
  EngineOptions options = Options();
  options.device = "gpu";
  EXPECT_THAT(ErrorOf(options), HasSubstr("--device must be auto or one of "));
  EXPECT_THAT(ErrorOf(options), HasSubstr("cpu, got \"gpu\""));
  options.device = "cuda";
  // Without CUDA; with it but without a card; with both, in float32.
  EXPECT_THAT(ErrorOf(options),
              ::testing::AnyOf(HasSubstr("--device=cuda: this build has no CUDA; it has cpu"),
                               HasSubstr("--device=cuda: no NVIDIA driver is installed"),
                               HasSubstr("--device=cuda: there is no NVIDIA GPU"),
                               HasSubstr("--device=cuda computes in bfloat16 only")));
}

TEST(EngineLoadTest, AutoSettlesOnTheFirstDeviceThereIs) {
  EngineOptions options = Options();
  options.device = options.dtype = "auto";
  const auto engine = Engine::Load(options);
  ASSERT_OK(engine);
  const bool cuda = OpenBackend("cuda", {}).ok();
  EXPECT_EQ((*engine)->options().device, cuda ? "cuda" : "cpu");
}

class RunnerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    EngineOptions options = Options();
    options.valid_vocab_size = 100;
    auto engine = Engine::Load(options);
    ASSERT_OK(engine);
    engine_ = *std::move(engine);
    greedy_.temperature = 0;
  }
  absl::StatusOr<StepOutput> Run(const std::vector<int32_t>& tokens, int start, int count,
                                 const std::vector<int32_t>& blocks) {
    Batch batch;
    batch.wants_layer_events = true;
    batch.items.push_back({tokens, start, count, static_cast<int>(tokens.size()), blocks,
                           start + count == static_cast<int>(tokens.size()) ? &greedy_ : nullptr,
                           -1});
    const auto step = engine_->runner().Launch(batch);
    if (!step.ok()) return step.status();
    layer_ready_ = step->layer_ready;
    return engine_->runner().Collect(step->id);
  }

  std::unique_ptr<Engine> engine_;
  SamplingParams greedy_;
  std::vector<std::shared_ptr<const ReadyEvent>> layer_ready_;  // of the last step launched
};

TEST_F(RunnerTest, NeverDrawsAPaddingRow) {
  for (int32_t first = 0; first < 60; ++first) {
    const auto out = Run({first, 3}, 0, 2, {5});
    ASSERT_OK(out);
    ASSERT_TRUE(out->items[0].has_token);
    EXPECT_LT(out->items[0].token.token, 100);
  }
}

TEST_F(RunnerTest, EveryLayerIsReadyAlsoWithoutASample) {
  ASSERT_OK(Run({1, 2, 3}, 0, 2, {0}));
  ASSERT_EQ(layer_ready_.size(), 2u);
  for (const auto& event : layer_ready_) EXPECT_TRUE(event->Ready());
}

TEST_F(RunnerTest, ASequenceThatCannotDrawLeavesItsNeighboursAlone) {
  const std::vector<int32_t> tokens = {1, 2, 3};
  const std::vector<std::vector<int32_t>> blocks = {{0}, {1}, {2}};
  SamplingParams impossible;  // every token would end it, and none may
  impossible.min_tokens = 5;
  for (int32_t id = 0; id < 100; ++id) impossible.stop_token_ids.push_back(id);
  Batch batch;
  for (size_t i = 0; i < 3; ++i) {
    batch.items.push_back({tokens, 0, 3, 3, blocks[i], i == 1 ? &impossible : &greedy_, -1});
  }
  const auto out = engine_->runner().Run(batch);
  ASSERT_OK(out);
  EXPECT_EQ(out->items[1].status.code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(out->items[1].has_token);
  for (size_t i : {0, 2}) {
    EXPECT_OK(out->items[i].status);
    EXPECT_TRUE(out->items[i].has_token);
  }
}

TEST_F(RunnerTest, BadItemsAreErrorsThatComputeNothing) {
  EXPECT_THAT(Run({1, 160}, 0, 2, {0}).status().ToString(),
              HasSubstr("token id 160 at position 1"));
  EXPECT_THAT(Run({1, -1}, 0, 2, {0}).status().ToString(), HasSubstr("token id -1"));
  EXPECT_THAT(Run({1, 2}, 0, 3, {0}).status().ToString(), HasSubstr("do not lie"));
  EXPECT_THAT(Run({1, 2}, 2, 0, {0}).status().ToString(), HasSubstr("do not lie"));
  EXPECT_THAT(Run(std::vector<int32_t>(20, 1), 0, 20, {0}).status().ToString(),
              HasSubstr("do not hold"));
  EXPECT_THAT(Run({1, 2}, 0, 2, {1 << 20}).status().ToString(), HasSubstr("outside of the pool"));
  EXPECT_THAT(Run(std::vector<int32_t>(65, 1), 0, 65, {0, 1, 2, 3, 4}).status().ToString(),
              HasSubstr("--max-num-batched-tokens=64"));
  EXPECT_TRUE(layer_ready_.empty());
}

}  // namespace
}  // namespace tandem::engine
