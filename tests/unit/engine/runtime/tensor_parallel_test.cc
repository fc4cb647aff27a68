// Models that are split over ranks say what whole ones say (reference_test.cc has some against
// Hugging Face).
#include "engine/runtime/tensor_parallel.h"

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "spdlog/sinks/ostream_sink.h"
#include "spdlog/spdlog.h"

#include "engine/device/cpu/host_ranks.h"
#include "engine/runtime/rank_threads.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

// Everything that may have a bias has one. Six query heads on a KV head, to be padded to eight.
constexpr char kConfig[] = R"({
  "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
  "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 256,
  "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-5,
  "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": false,
  "attention_bias": true, "mlp_bias": true, "eos_token_id": 2, "torch_dtype": "float32"})";

class TensorParallelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "tensor_parallel_test_" +
           ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::create_directories(dir_);
    std::ofstream(dir_ + "/config.json") << kConfig;
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  EngineOptions Options(int ranks) const {
    EngineOptions options;
    options.model_dir = dir_;
    options.load_format = "dummy";
    options.device = "cpu";
    options.dtype = "float32";
    options.num_threads = ranks;
    options.kv_cache_memory_bytes = 8 << 20;
    options.tensor_parallel_size = ranks;
    return options;
  }

  std::string dir_;
};

// What is logged while it lives.
class LogSeen {
 public:
  LogSeen() { spdlog::default_logger()->sinks().push_back(sink_); }
  ~LogSeen() { spdlog::default_logger()->sinks().pop_back(); }
  std::string text() const { return out_.str(); }

 private:
  std::ostringstream out_;
  const std::shared_ptr<spdlog::sinks::ostream_sink_mt> sink_ =
      std::make_shared<spdlog::sinks::ostream_sink_mt>(out_);
};

// Some sequences together: prompts in pieces, then tokens one by one, every other one drawn with a
// temperature.
std::vector<TokenLogprob> Generate(Engine* engine) {
  struct Sequence {
    std::vector<int32_t> tokens;
    int prompt_length = 0;
    int computed = 0;
    SamplingParams sampling;
    BlockLease lease;
  };
  std::vector<Sequence> sequences;
  const int vocab = engine->config().vocab_size;
  for (const int length : {1, 5, 40, 90}) {
    Sequence& s = sequences.emplace_back();
    for (int i = 0; i < length; ++i) s.tokens.push_back((length * 31 + i * 17) % vocab);
    s.prompt_length = length;
    s.sampling.temperature = sequences.size() % 2 == 0 ? 1.0f : 0.0f;
    s.sampling.seed = 7;
    s.sampling.logprobs = 0;
    s.lease = *engine->pool().Reserve(BlocksFor(length + 25, engine->options().block_size));
  }
  std::vector<TokenLogprob> drawn;
  for (int step = 0; step < 25; ++step) {
    Batch batch;
    for (Sequence& s : sequences) {
      BatchItem& item = batch.items.emplace_back();
      item.tokens = s.tokens;
      item.start = s.computed;
      item.num_tokens = std::min(33, static_cast<int>(s.tokens.size()) - s.computed);
      item.prompt_length = s.prompt_length;
      item.block_table = s.lease.blocks();
      const bool last = item.start + item.num_tokens == static_cast<int>(s.tokens.size());
      item.sampling = last ? &s.sampling : nullptr;
    }
    const absl::StatusOr<StepOutput> output = engine->runner().Run(batch);
    if (!output.ok()) {
      ADD_FAILURE() << output.status();
      return drawn;
    }
    for (size_t i = 0; i < sequences.size(); ++i) {
      sequences[i].computed += batch.items[i].num_tokens;
      if (!output->items[i].has_token) continue;
      sequences[i].tokens.push_back(output->items[i].token.token);
      drawn.push_back(output->items[i].token);
    }
  }
  return drawn;
}

void ExpectSame(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b) {
  ASSERT_EQ(a.size(), b.size());
  ASSERT_GT(a.size(), 90u);
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].token, b[i].token) << i;
    EXPECT_NEAR(a[i].logprob, b[i].logprob, 1e-4) << i;
  }
}

TEST_F(TensorParallelTest, RanksSayWhatTheWholeModelSays) {
  const auto whole = Engine::Load(Options(1));
  ASSERT_OK(whole);
  const std::vector<TokenLogprob> want = Generate(whole->get());
  for (const int ranks : {2, 4}) {
    for (const bool pad : {false, true}) {
      SCOPED_TRACE(::testing::Message() << ranks << " ranks, padded " << pad);
      EngineOptions options = Options(ranks);
      options.pad_query_heads = pad;
      const auto split = Engine::Load(options);
      ASSERT_OK(split);
      ExpectSame(Generate(split->get()), want);
    }
  }
}

TEST_F(TensorParallelTest, WeightsThatAreRoundedAreTheWholeModels) {
  EngineOptions options = Options(1);
  const auto plain = Engine::Load(options);
  options.quantization = "fp8";
  const auto whole = Engine::Load(options);
  options.tensor_parallel_size = options.num_threads = 2;
  const auto split = Engine::Load(options);
  ASSERT_OK(plain);
  ASSERT_OK(whole);
  ASSERT_OK(split);
  const std::vector<TokenLogprob> want = Generate(whole->get());
  ExpectSame(Generate(split->get()), want);
  const std::vector<TokenLogprob> other = Generate(plain->get());
  EXPECT_FALSE(std::equal(want.begin(), want.end(), other.begin(), other.end(),
                          [](const TokenLogprob& a, const TokenLogprob& b) {
                            return a.token == b.token && a.logprob == b.logprob;
                          }))
      << "nothing was rounded";
}

TEST_F(TensorParallelTest, WeightsOf4BitsAreSplitToo) {
  for (const char* name : {"gptq", "awq"}) {
    SCOPED_TRACE(name);
    std::vector<TokenLogprob> want;
    for (const int ranks : {1, 2}) {
      EngineOptions options = Options(ranks);
      options.model_dir = SourcePath(std::string("tests/data/quantised/") + name);
      options.load_format = "auto";
      const auto engine = Engine::Load(options);
      ASSERT_OK(engine);
      std::vector<TokenLogprob> drawn = Generate(engine->get());
      if (ranks == 1) {
        want = std::move(drawn);
      } else {
        ExpectSame(drawn, want);
      }
    }
  }
}

TEST_F(TensorParallelTest, ThePoolIsTheSameInPieces) {
  const auto whole = Engine::Load(Options(1)), split = Engine::Load(Options(2));
  ASSERT_OK(whole);
  ASSERT_OK(split);
  EXPECT_EQ((*split)->config().num_heads, (*whole)->config().num_heads);
  EXPECT_EQ((*split)->config().intermediate_size, (*whole)->config().intermediate_size);
  EXPECT_EQ((*split)->model_digest(), (*whole)->model_digest());
  EXPECT_EQ((*split)->region().layout, (*whole)->region().layout);
  EXPECT_EQ((*split)->region().num_blocks, (*whole)->region().num_blocks);
  EXPECT_EQ((*split)->options().max_model_len, (*whole)->options().max_model_len);
  EXPECT_EQ((*split)->pool().counts().total, (*whole)->pool().counts().total);
  const std::vector<KvRegion> regions = (*split)->regions();
  ASSERT_EQ(regions.size(), 2u);
  EXPECT_EQ(regions[1].first_kv_head, 2);
  EXPECT_EQ(regions[1].layout.num_kv_heads, 2);
  EXPECT_EQ(regions[0].TotalBytes() + regions[1].TotalBytes(), (*split)->region().TotalBytes());
}

TEST_F(TensorParallelTest, WhatRanksOnACpuDoNotTakeIsSaid) {
  for (const int ranks : {1, 2}) {
    EngineOptions options = Options(ranks);
    options.devices = ranks == 1 ? "0" : "0,1";
    EXPECT_THAT(std::string(Engine::Load(options).status().message()),
                ::testing::HasSubstr("names GPUs, and this worker computes on the CPU "
                                     "(--device=cpu): leave --devices out"));
  }
  {
    const LogSeen log;
    ASSERT_OK(Engine::Load(Options(2)));
    EXPECT_EQ(log.text().find("--num-threads"), std::string::npos);
    EXPECT_EQ(log.text().find("--shared-weights"), std::string::npos);
  }
  const LogSeen log;
  EngineOptions options = Options(2);
  options.num_threads = 1;
  options.shared_weights = "/dev/null";
  ASSERT_OK(Engine::Load(options));
  EXPECT_THAT(log.text(), ::testing::HasSubstr("1 compute threads (--num-threads) for 2 ranks"));
  EXPECT_THAT(log.text(), ::testing::HasSubstr("--shared-weights is left aside"));
}

TEST_F(TensorParallelTest, ABadBatchIsRefusedByAllRanks) {
  const auto split = Engine::Load(Options(2));
  ASSERT_OK(split);
  Batch batch;
  batch.items.emplace_back().num_tokens = 1;
  EXPECT_TRUE(absl::IsInvalidArgument((*split)->runner().Launch(batch).status()));
  EXPECT_EQ(Generate(split->get()).size() > 90, true);
}

// Events that the sender of a layer waits for.
TEST_F(TensorParallelTest, ALayerIsReadyOnceItIsOnAllRanks) {
  const auto split = Engine::Load(Options(2));
  ASSERT_OK(split);
  const std::vector<int32_t> tokens = {1, 2, 3};
  const BlockLease lease = *(*split)->pool().Reserve(1);
  Batch batch;
  batch.wants_layer_events = true;
  BatchItem& item = batch.items.emplace_back();
  item.tokens = tokens;
  item.num_tokens = item.prompt_length = 3;
  item.block_table = lease.blocks();
  const auto step = (*split)->runner().Launch(batch);
  ASSERT_OK(step);
  ASSERT_EQ(step->layer_ready.size(), 3u);
  EXPECT_FALSE(step->layer_ready[2]->WaitFor(absl::ZeroDuration()));
  ASSERT_OK((*split)->runner().Collect(step->id));
  for (const auto& event : step->layer_ready) EXPECT_TRUE(event->Ready());
}

TEST(DevicesOfTest, AreThoseNamedOrThoseBehindTheFirst) {
  EngineOptions options;
  options.tensor_parallel_size = 3;
  options.gpu = 2;
  EXPECT_THAT(*DevicesOf(options), ::testing::ElementsAre(2, 3, 4));
  options.devices = "5,0,0";
  EXPECT_THAT(std::string(DevicesOf(options).status().message()),
              ::testing::HasSubstr("--gpu=2 beside --devices=5,0,0"));
  options.gpu = 0;
  EXPECT_THAT(*DevicesOf(options), ::testing::ElementsAre(5, 0, 0));
  options.devices = "0,1";
  EXPECT_THAT(std::string(DevicesOf(options).status().message()),
              ::testing::HasSubstr("--devices=0,1 names 2 GPUs, and --tensor-parallel-size=3"));
  for (const char* wrong : {"0,1,b", "0,1,-1", "0,1,2.5"}) {
    options.devices = wrong;
    EXPECT_TRUE(absl::IsInvalidArgument(DevicesOf(options).status())) << wrong;
  }
}

TEST(CheckAgreementTest, FindsEveryTokenThatDiffers) {
  StepOutput first;
  first.items.resize(3);
  first.items[1].has_token = first.items[2].has_token = true;
  first.items[1].token.token = 7;
  first.items[2].token.token = 7;
  first.items[2].further.resize(2);
  EXPECT_OK(CheckAgreement(first, first, 1));
  const std::vector<std::function<void(StepOutput*)>> breaks = {
      [](StepOutput* output) { output->items[0].status = absl::InternalError("NaN"); },
      [](StepOutput* output) { output->items[0].has_token = true; },
      [](StepOutput* output) { output->items[1].token.token = 8; },
      [](StepOutput* output) { output->items[2].further.pop_back(); },
      // Drawn behind the draft: no other rank's draft says what it should have been.
      [](StepOutput* output) { output->items[2].further.back().token = 8; },
  };
  for (const auto& break_it : breaks) {
    StepOutput other = first;
    break_it(&other);
    EXPECT_TRUE(absl::IsInternal(CheckAgreement(first, other, 1))) << &break_it - breaks.data();
  }
}

// The order of the sum is that of the ranks, whoever is first: floating point tells.
TEST(HostRanksTest, AddUpInTheOrderOfRanks) {
  constexpr int kRanks = 3, kCount = 100;
  HostRanks ranks(kRanks);
  RankThreads threads(kRanks);
  std::vector<std::vector<float>> values(kRanks, std::vector<float>(kCount, 1e8f));
  for (int round = 0; round < 50; ++round) {
    for (auto& own : values) std::fill(own.begin(), own.end(), 1e8f);
    threads.Run([&](int rank) {
      std::vector<float>& own = values[static_cast<size_t>(rank)];
      Collective* collective = ranks.at(rank);
      collective->BeginSum(own.data(), own.size(), nullptr);
      for (float& value : own) value += rank == 0 ? 0.0f : rank == 1 ? -1e8f : 1.0f;
      collective->EndSum(own.data(), own.size(), nullptr);
    });
    // In any other order the 1 is lost.
    for (const auto& own : values) {
      for (const float value : own) ASSERT_EQ(value, 1.0f);
    }
  }
}

}  // namespace
}  // namespace tandem::engine
