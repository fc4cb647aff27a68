// The engine on the GPU against Hugging Face transformers in float64: the committed fixtures, and
// the five models of the shared reference data.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "gtest/gtest.h"

#include "engine/model/shard.h"
#include "engine/runtime/engine.h"
#include "tests/support/paths.h"
#include "tests/unit/engine/runtime/model_under_test.h"
#include "tests/unit/engine/runtime/reference_case.h"

namespace tandem::engine {
namespace {

// Relative L2 of logits, over all prompts of a model and of the worst one. A simulation in float64
// that rounds nothing but the inputs of products to bfloat16 comes to 8.5e-3 and 1.06e-2 on
// tiny-yarn. The fixtures are so narrow (16 to 64 wide) that rounding averages out less.
struct Tolerance {
  double model, prompt;
};
constexpr Tolerance kFixtures{1.5e-2, 2e-2}, kSharedModels{1e-2, 1.5e-2};

// Rounding adds up over a model's layers. The reference of a deep one
// (scripts/make_gpu_reference.py) says how far transformers' own bfloat16 model is from it, and the
// engine may not be further away.
Tolerance ToleranceFor(const std::string& dir, const Tolerance& usual) {
  const double of_peer = LoadReference(dir).value("bfloat16_relative_l2", 0.0);
  return {std::max(usual.model, of_peer), std::max(usual.prompt, 1.5 * of_peer)};
}

// Tokens must agree where the reference's margin is larger. It gives the smallest of a whole
// answer: where that is smaller, the first token that differs must be as near a tie by our own
// logits.
constexpr float kMargin = 0.1f;
constexpr int kAlternatives = 5;
constexpr int kChunk = 37;  // of a prompt

#define TANDEM_REQUIRE_CUDA()                                            \
  do {                                                                   \
    if (const auto backend_ = OpenBackend("cuda", {}); !backend_.ok()) { \
      GTEST_SKIP() << backend_.status().ToString();                      \
    }                                                                    \
  } while (false)

// Of two vectors, or of several pairs taken together.
class RelativeL2 {
 public:
  // Returns that of this pair.
  double Add(std::span<const float> got, std::span<const float> want) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      difference += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
      norm += std::pow(static_cast<double>(want[i]), 2);
    }
    difference_ += difference;
    norm_ += norm;
    return std::sqrt(difference / norm);
  }
  double value() const { return std::sqrt(difference_ / norm_); }

 private:
  double difference_ = 0, norm_ = 0;
};

void CheckLogits(const std::string& dir, const Tolerance& tolerance) {
  auto model = ModelUnderTest::Load(dir, Element::kBFloat16, 2, 16, 64, false, "cuda");
  ASSERT_OK(model);
  std::mt19937 random(1);
  const std::vector<int32_t> blocks = model->ShuffledBlocks(&random);
  RelativeL2 at_once, as_a_step;
  double worst = 0;
  for (const ReferenceCase& c : LoadReferenceCases(dir)) {
    SCOPED_TRACE(fmt::format("prompt of {} tokens", c.prompt.size()));
    const int length = static_cast<int>(c.prompt.size());
    ASSERT_EQ(c.first_logits.size(), model->vocab());
    const std::vector<float> whole = model->Run({{&c.prompt, 0, length, &blocks}});
    double error = at_once.Add(std::span(whole).last(model->vocab()), c.first_logits);
    EXPECT_LT(error, tolerance.prompt);
    worst = std::max(worst, error);
    if (length == 1) continue;
    // The last position as a decode step.
    model->Run({{&c.prompt, 0, length - 1, &blocks}});
    error = as_a_step.Add(model->Run({{&c.prompt, length - 1, 1, &blocks}}), c.first_logits);
    EXPECT_LT(error, tolerance.prompt);
    worst = std::max(worst, error);
  }
  EXPECT_LT(at_once.value(), tolerance.model);
  EXPECT_LT(as_a_step.value(), tolerance.model);
  fmt::print(
      "  relative L2 of logits {:.2e}, by a decode step {:.2e}, of the worst prompt {:.2e}\n",
      at_once.value(), as_a_step.value(), worst);
}

// All cases of a model at once, greedily, two steps in flight: prompts in chunks, then a token per
// step, whose value the host sees a step late.
class Generations {
 public:
  Generations(Engine* engine, const std::vector<ReferenceCase>& cases) : engine_(engine) {
    params_.temperature = 0;
    params_.repetition_penalty = 1;
    params_.logprobs = kAlternatives;
    for (const ReferenceCase& c : cases) {
      Sequence& s = sequences_.emplace_back();
      s.reference = &c;
      s.tokens = c.prompt;
      const int length = static_cast<int>(c.prompt.size() + c.greedy.size());
      auto lease = engine->pool().Reserve(length / engine->options().block_size + 1);
      EXPECT_OK(lease);
      if (lease.ok()) s.lease = *std::move(lease);
    }
  }

  void Run() {
    while (Launch() || !launched_.empty()) {
      if (launched_.size() < 2 && !finished_) continue;
      if (!Collect()) return;
    }
  }

  const std::vector<TokenLogprob>& generated(size_t i) const { return sequences_[i].generated; }

 private:
  struct Sequence {
    const ReferenceCase* reference = nullptr;
    std::vector<int32_t> tokens;  // that the host knows
    std::vector<TokenLogprob> generated;
    int computed = 0;  // positions launched
    int drawn = 0;     // tokens launched
    DrawnToken pending;
    BlockLease lease;
  };
  struct Launched {
    StepId id;
    std::vector<Sequence*> drawing;  // by item; null: draws nothing
  };

  // False where nothing is left to launch.
  bool Launch() {
    Batch batch;
    Launched launched;
    for (Sequence& s : sequences_) {
      if (s.drawn == static_cast<int>(s.reference->greedy.size())) continue;
      const int prompt = static_cast<int>(s.reference->prompt.size());
      BatchItem& item = batch.items.emplace_back();
      item.tokens = s.tokens;
      item.start = s.computed;
      item.num_tokens = std::min(kChunk, std::max(prompt - s.computed, 1));
      item.prompt_length = prompt;
      item.block_table = s.lease.blocks();
      const bool draws = s.computed + item.num_tokens >= prompt;
      item.sampling = draws ? &params_ : nullptr;
      if (s.computed >= prompt) item.pending = s.pending;
      s.computed += item.num_tokens;
      launched.drawing.push_back(draws ? &s : nullptr);
    }
    finished_ = batch.items.empty();
    if (finished_) return false;
    auto step = engine_->runner().Launch(batch);
    EXPECT_OK(step);
    if (!step.ok()) return false;
    launched.id = step->id;
    for (size_t i = 0; i < launched.drawing.size(); ++i) {
      if (launched.drawing[i] == nullptr) continue;
      launched.drawing[i]->pending = {step->id, static_cast<int>(i)};
      ++launched.drawing[i]->drawn;
    }
    launched_.push_back(std::move(launched));
    return true;
  }

  bool Collect() {
    const Launched launched = std::move(launched_.front());
    launched_.pop_front();
    auto output = engine_->runner().Collect(launched.id);
    EXPECT_OK(output);
    if (!output.ok()) return false;
    for (size_t i = 0; i < launched.drawing.size(); ++i) {
      EXPECT_OK(output->items[i].status);
      EXPECT_EQ(output->items[i].has_token, launched.drawing[i] != nullptr);
      if (launched.drawing[i] == nullptr) continue;
      launched.drawing[i]->tokens.push_back(output->items[i].token.token);
      launched.drawing[i]->generated.push_back(output->items[i].token);
    }
    return true;
  }

  Engine* engine_;
  SamplingParams params_;
  std::deque<Sequence> sequences_;
  std::deque<Launched> launched_;
  bool finished_ = false;
};

void CheckGeneration(const std::string& dir, int ranks = 1, const std::string& devices = "") {
  EngineOptions options;
  options.tensor_parallel_size = ranks;
  options.devices = devices;
  options.model_dir = dir;
  options.device = "cuda";
  options.kv_cache_memory_bytes = 256 << 20;
  options.max_num_batched_tokens = 512;
  options.max_num_seqs = 64;
  auto engine = Engine::Load(options);
  ASSERT_OK(engine);
  ASSERT_EQ((*engine)->runner().max_in_flight(), 2);
  const std::vector<ReferenceCase> cases = LoadReferenceCases(dir);
  Generations run(engine->get(), cases);
  run.Run();
  size_t same = 0, all = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(fmt::format("prompt of {} tokens", cases[i].prompt.size()));
    const std::vector<TokenLogprob>& got = run.generated(i);
    ASSERT_EQ(got.size(), cases[i].greedy.size());
    size_t first = 0;  // token that differs
    while (first < got.size() && got[first].token == cases[i].greedy[first]) ++first;
    same += first;
    all += got.size();
    if (first == got.size()) continue;
    EXPECT_LE(cases[i].min_margin, kMargin) << "token " << first;
    const auto wanted = std::find_if(
        got[first].top.begin(), got[first].top.end(),
        [&](const auto& candidate) { return candidate.token == cases[i].greedy[first]; });
    ASSERT_NE(wanted, got[first].top.end()) << "token " << first;
    EXPECT_GT(wanted->logprob, got[first].logprob - kMargin) << "token " << first;
  }
  fmt::print("  {} of {} greedy tokens up to the first near tie of each prompt\n", same, all);
}

void CheckAll(const std::string& folder, size_t at_least, const Tolerance& tolerance) {
  const std::vector<std::string> models = ReferenceModels(folder);
  ASSERT_GE(models.size(), at_least);
  for (const std::string& dir : models) {
    SCOPED_TRACE(dir);
    fmt::print("{}\n", dir);
    ASSERT_FALSE(LoadReferenceCases(dir).empty());
    CheckLogits(dir, ToleranceFor(dir, tolerance));
    CheckGeneration(dir);
  }
}

// A sequence alone, in company, and in chunks.
void ExpectBitIdenticalLogits(bool fp8_kv) {
  std::vector<std::string> models = ReferenceModels(SourcePath("tests/data/engine"));
  if (!SharedDir().empty()) {
    for (const std::string& dir : ReferenceModels(SharedDir() + "/reference"))
      models.push_back(dir);
  }
  for (const std::string& dir : models) {
    SCOPED_TRACE(dir);
    auto model =
        ModelUnderTest::Load(dir, Element::kBFloat16, 2, 16, 160, false, "cuda", true, fp8_kv);
    ASSERT_OK(model);
    std::mt19937 random(3);
    const std::vector<int32_t> blocks = model->ShuffledBlocks(&random);
    constexpr int kSequences = 7, kLength = 250, kBlocksEach = kLength / 16 + 1;
    std::vector<std::vector<int32_t>> tokens(kSequences), tables(kSequences);
    for (size_t s = 0; s < kSequences; ++s) {
      for (int i = 0; i < kLength; ++i) {
        tokens[s].push_back(static_cast<int32_t>(random() % model->vocab()));
      }
      tables[s].assign(blocks.begin() + static_cast<long>(s * kBlocksEach),
                       blocks.begin() + static_cast<long>((s + 1) * kBlocksEach));
    }
    const std::vector<float> alone = model->Run({{&tokens[3], 0, kLength, &tables[3]}});
    // Sequences of different lengths, the one that is compared in their midst.
    std::vector<ModelUnderTest::Chunk> together;
    size_t rows_before = 0;
    for (size_t s = 0; s < kSequences; ++s) {
      const int length = s == 3 ? kLength : 20 + 31 * static_cast<int>(s);
      if (s < 3) rows_before += static_cast<size_t>(length);
      together.push_back({&tokens[s], 0, length, &tables[s]});
    }
    const std::vector<float> all = model->Run(together);
    const std::span<const float> in_company =
        std::span(all).subspan(rows_before * model->vocab(), alone.size());
    std::vector<float> chunked;
    for (int start = 0; start < kLength;) {
      const int count = start < 200 ? std::min(1 + start / 2, kLength - start) : 1;
      const std::vector<float> part = model->Run({{&tokens[3], start, count, &tables[3]}});
      chunked.insert(chunked.end(), part.begin(), part.end());
      start += count;
    }
    // Where few rows are wanted, the last layer is computed of those alone.
    const std::vector<float> last =
        model->Run({{&tokens[3], 0, kLength, &tables[3]}}, {kLength - 1});
    ASSERT_EQ(last.size(), model->vocab());
    EXPECT_EQ(
        std::memcmp(last.data(), &alone[alone.size() - last.size()], last.size() * sizeof(float)),
        0);
    size_t company_differs = 0, chunks_differ = 0;
    for (size_t i = 0; i < alone.size(); ++i) {
      company_differs += in_company[i] != alone[i];
      chunks_differ += chunked[i] != alone[i];
    }
    EXPECT_EQ(company_differs, 0u) << "of " << alone.size();
    EXPECT_EQ(chunks_differ, 0u) << "of " << alone.size();
  }
}

TEST(CudaEngineTest, BatchInvariantLogitsAreBitIdentical) {
  TANDEM_REQUIRE_CUDA();
  ExpectBitIdenticalLogits(false);
}

TEST(CudaEngineTest, SoAreTheyWithKvInFp8) {
  TANDEM_REQUIRE_CUDA();
  ExpectBitIdenticalLogits(true);
}

TEST(CudaEngineTest, Fixtures) {
  TANDEM_REQUIRE_CUDA();
  CheckAll(SourcePath("tests/data/engine"), 7, kFixtures);
}

// The GPU's bfloat16 model against the CPU's float32 one, both with KV in e4m3: keys and values
// that bfloat16 makes a little different round to neighbours now and then, a sixteenth apart.
TEST(CudaEngineTest, KvInFp8GivesTheLogitsOfTheCpu) {
  TANDEM_REQUIRE_CUDA();
  constexpr double kLimit = 4e-2;
  std::vector<std::string> models = ReferenceModels(SourcePath("tests/data/engine"));
  models.push_back(SourcePath("models/demo"));
  for (const std::string& dir : models) {
    SCOPED_TRACE(dir);
    constexpr int kBlocks = 64;
    auto cpu = ModelUnderTest::Load(dir, Element::kFloat32, 2, 16, kBlocks, false, "cpu", false,
                                    /*fp8_kv=*/true);
    auto gpu = ModelUnderTest::Load(dir, Element::kBFloat16, 2, 16, kBlocks, false, "cuda", false,
                                    /*fp8_kv=*/true);
    ASSERT_OK(cpu);
    ASSERT_OK(gpu);
    std::mt19937 random(11);
    const std::vector<int32_t> blocks = gpu->ShuffledBlocks(&random);
    std::vector<int32_t> tokens, others;
    for (int i = 0; i < 200; ++i) {
      tokens.push_back(static_cast<int32_t>(random() % cpu->vocab()));
      others.push_back(static_cast<int32_t>(random() % cpu->vocab()));
    }
    const std::vector<int32_t> other_blocks(blocks.begin() + 20, blocks.end());
    // A prompt at once, the rest of it in a chunk beside another's decode step, a decode step.
    const std::vector<std::vector<ModelUnderTest::Chunk>> steps = {
        {{&tokens, 0, 120, &blocks}, {&others, 0, 3, &other_blocks}},
        {{&tokens, 120, 79, &blocks}, {&others, 3, 1, &other_blocks}},
        {{&tokens, 199, 1, &blocks}}};
    double worst = 0;
    for (const auto& step : steps) {
      const std::vector<float> want = cpu->Run(step), got = gpu->Run(step);
      worst = std::max(worst, RelativeL2().Add(got, want));
    }
    EXPECT_LT(worst, kLimit);
    fmt::print("  {}: relative L2 of logits {:.2e} at worst\n", dir, worst);
  }
}

// Weights stay of 4 bits: their products and, for many rows, the same weights in bfloat16 scratch
// memory, against the CPU's float32 model of the same checkpoint.
void ExpectTheCpusTokens(const std::string& name, bool all_layers_kept) {
  SCOPED_TRACE(name);
  const std::string dir = SourcePath("tests/data/quantised/" + name);
  auto cpu = ModelUnderTest::Load(dir, Element::kFloat32, 2, 16, 64);
  auto gpu = ModelUnderTest::Load(dir, Element::kBFloat16, 2, 16, 64, false, "cuda");
  ASSERT_OK(cpu);
  ASSERT_OK(gpu);
  const LayerWeights& layer = gpu->decoder->weights().layers[0];
  EXPECT_NE(layer.down.matrix.group_size, 0u);
  EXPECT_NE(layer.output.matrix.group_size, 0u);
  if (all_layers_kept) {
    EXPECT_NE(layer.qkv.matrix.group_size, 0u);
    EXPECT_NE(layer.gate_up.matrix.group_size, 0u);
  }
  std::mt19937 random(3);
  const size_t vocab = cpu->vocab();
  std::vector<int32_t> blocks(64), tokens;
  std::iota(blocks.begin(), blocks.end(), 0);
  for (const int length : {1, 40, 64, 65, 150}) {
    SCOPED_TRACE(length);
    tokens.clear();
    for (int i = 0; i < length; ++i) tokens.push_back(static_cast<int32_t>(random() % vocab));
    std::vector<float> want = cpu->Run({{&tokens, 0, length, &blocks}});
    std::vector<float> got = gpu->Run({{&tokens, 0, length, &blocks}});
    EXPECT_LT(RelativeL2().Add(got, want), kFixtures.prompt);
    int agreed = 0;
    for (int step = 0; step < 24; ++step) {
      want.erase(want.begin(), want.end() - static_cast<ptrdiff_t>(vocab));
      got.erase(got.begin(), got.end() - static_cast<ptrdiff_t>(vocab));
      EXPECT_LT(RelativeL2().Add(got, want), 2 * kFixtures.prompt);
      const auto best = std::max_element(want.begin(), want.end()) - want.begin();
      const auto taken = std::max_element(got.begin(), got.end()) - got.begin();
      const float margin = want[static_cast<size_t>(best)] - want[static_cast<size_t>(taken)];
      EXPECT_LT(margin, kMargin) << "step " << step;
      agreed += best == taken;
      tokens.push_back(static_cast<int32_t>(best));
      const int last = static_cast<int>(tokens.size()) - 1;
      want = cpu->Run({{&tokens, last, 1, &blocks}});
      got = gpu->Run({{&tokens, last, 1, &blocks}});
    }
    EXPECT_GE(agreed, 20);
  }
}

TEST(CudaEngineTest, WeightsOf4BitsGiveTheTokensOfTheCpu) {
  TANDEM_REQUIRE_CUDA();
  ExpectTheCpusTokens("awq", true);
  // Act-order: queries, keys and values have orders of their own there.
  ExpectTheCpusTokens("gptq", false);
}

// Speed tests load such. Products of the 4-bit weights and of the same weights made bfloat16 agree.
TEST(CudaEngineTest, DummiesOfAConfigWith4BitsHave4Bits) {
  TANDEM_REQUIRE_CUDA();
  const std::string dir = SourcePath("tests/data/quantised/awq");
  auto gpu = ModelUnderTest::Load(dir, Element::kBFloat16, 2, 16, 64, true, "cuda");
  ASSERT_OK(gpu);
  const LayerWeights& layer = gpu->decoder->weights().layers[0];
  for (const LinearWeights* weights : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
    EXPECT_NE(weights->matrix.group_size, 0u);
  }
  std::vector<int32_t> blocks(64), tokens;
  std::iota(blocks.begin(), blocks.end(), 0);
  for (int i = 0; i < 70; ++i) tokens.push_back(static_cast<int32_t>(i * 7 % gpu->vocab()));
  const std::vector<float> whole = gpu->Run({{&tokens, 0, 70, &blocks}});
  gpu->Run({{&tokens, 0, 65, &blocks}});
  const std::vector<float> last = gpu->Run({{&tokens, 65, 5, &blocks}});
  const std::vector<float> want(whole.end() - static_cast<ptrdiff_t>(last.size()), whole.end());
  EXPECT_LT(RelativeL2().Add(last, want), 2 * kFixtures.prompt);
}

// The ranks of each model that can be split: all on the first card, and each on its own where there
// are so many. Draws that differ between ranks are errors.
TEST(CudaEngineTest, RanksSayWhatTheWholeModelSays) {
  TANDEM_REQUIRE_CUDA();
  std::vector<std::string> models = ReferenceModels(SourcePath("tests/data/engine"));
  if (!SharedDir().empty()) {
    for (const std::string& dir : ReferenceModels(SharedDir() + "/reference"))
      models.push_back(dir);
  }
  int split = 0;
  for (const std::string& dir : models) {
    const auto config = ModelConfig::Load(dir);
    ASSERT_OK(config);
    for (const int ranks : {2, 3, 4}) {
      if (!ShardOf(*config, {0, ranks}).ok()) continue;
      ++split;
      std::string devices = "0";
      for (int rank = 1; rank < ranks; ++rank) devices += ",0";
      SCOPED_TRACE(fmt::format("{}, {} ranks", dir, ranks));
      fmt::print("{}, {} ranks\n", dir, ranks);
      CheckGeneration(dir, ranks, devices);
      if (!OpenBackend("cuda", {.gpu = ranks - 1}).ok()) continue;
      fmt::print("  each on its own card\n");
      CheckGeneration(dir, ranks);
    }
  }
  EXPECT_GE(split, 3);
}

// Split, they are bfloat16.
TEST(CudaEngineTest, WeightsOf4BitsAreSplitToo) {
  TANDEM_REQUIRE_CUDA();
  for (const char* name : {"awq", "gptq"}) {
    SCOPED_TRACE(name);
    std::vector<std::vector<float>> logprobs;
    for (const int ranks : {1, 2}) {
      EngineOptions options;
      options.model_dir = SourcePath(std::string("tests/data/quantised/") + name);
      options.device = "cuda";
      options.kv_cache_memory_bytes = 64 << 20;
      options.max_num_batched_tokens = 512;
      options.max_num_seqs = 64;
      options.tensor_parallel_size = ranks;
      options.devices = ranks == 1 ? "0" : "0,0";
      const auto engine = Engine::Load(options);
      ASSERT_OK(engine);
      const BlockLease lease = *(*engine)->pool().Reserve(8);
      std::vector<int32_t> tokens;
      for (int i = 0; i < 100; ++i) tokens.push_back(i * 7 % (*engine)->config().vocab_size);
      Batch batch;
      BatchItem& item = batch.items.emplace_back();
      item.tokens = tokens;
      item.num_tokens = 99;  // what follows is known
      item.prompt_length = 100;
      item.prompt_logprobs = 0;
      item.block_table = lease.blocks();
      const auto output = (*engine)->runner().Run(batch);
      ASSERT_OK(output);
      std::vector<float>& own = logprobs.emplace_back();
      for (const TokenLogprob& token : output->items[0].prompt_logprobs) {
        own.push_back(token.logprob);
      }
    }
    ASSERT_GE(logprobs[0].size(), 99u);
    EXPECT_LT(RelativeL2().Add(logprobs[1], logprobs[0]), 2 * kFixtures.prompt);
  }
}

TEST(CudaEngineTest, RanksThatCannotBeAreRefused) {
  TANDEM_REQUIRE_CUDA();
  EngineOptions options;
  options.model_dir = SourcePath("tests/data/engine/qwen3-gqa");
  options.device = "cuda";
  options.tensor_parallel_size = 2;
  options.devices = "0";
  EXPECT_NE(Engine::Load(options).status().ToString().find("--devices=0 names 1 GPUs"),
            std::string::npos);
  options.devices = "0,99";
  EXPECT_NE(Engine::Load(options).status().ToString().find("GPU 99: this process sees"),
            std::string::npos);
  options.devices = "0,0";
  options.kv_cache_memory_bytes = int64_t{1} << 50;
  EXPECT_TRUE(absl::IsResourceExhausted(Engine::Load(options).status()));
}

TEST(CudaEngineTest, SharedModels) {
  TANDEM_REQUIRE_CUDA();
  TANDEM_REQUIRE_SHARED();
  CheckAll(SharedDir() + "/reference", 1, kSharedModels);
}

}  // namespace
}  // namespace tandem::engine
