// Logits, greedy tokens and log probabilities against Hugging Face transformers in float64.
#include <cmath>

#include "fmt/format.h"
#include "gtest/gtest.h"

#include "common/base/cpu_features.h"
#include "engine/runtime/engine.h"
#include "tests/support/paths.h"
#include "tests/unit/engine/runtime/model_under_test.h"
#include "tests/unit/engine/runtime/reference_case.h"

namespace tandem::engine {
namespace {

double RelativeL2(std::span<const float> got, std::span<const float> want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
    norm += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(difference / norm);
}

struct Limits {
  Element element;
  const char* dtype;
  const char* kv_cache_dtype;
  double logits;   // relative L2
  double logprob;  // absolute, for log probabilities near zero
  float margin;    // tokens must agree where the reference's margin is larger
};
constexpr Limits kFloat32{Element::kFloat32, "float32", "auto", 1e-4, 2e-3, 0.0f};
constexpr Limits kBFloat16{Element::kBFloat16, "bfloat16", "auto", 2e-2, 0.15, 0.1f};
constexpr Limits kFp8Kv{Element::kFloat32, "float32", "fp8", 1e-1, 1.5, 0.25f};

// Very unlikely tokens have logits far from the others, with an error in proportion.
double Tolerance(const Limits& limits, float logprob) {
  return limits.logprob * std::max(1.0, std::abs(static_cast<double>(logprob)) / 8);
}

void CheckLogits(const std::string& dir, const Limits& limits) {
  const bool fp8_kv = std::string(limits.kv_cache_dtype) == "fp8";
  auto model = ModelUnderTest::Load(dir, limits.element, 2, 16, 64, false, "cpu", false, fp8_kv);
  ASSERT_OK(model);
  std::mt19937 random(1);
  const std::vector<int32_t> blocks = model->ShuffledBlocks(&random);
  for (const ReferenceCase& c : LoadReferenceCases(dir)) {
    SCOPED_TRACE(fmt::format("prompt of {} tokens", c.prompt.size()));
    const int length = static_cast<int>(c.prompt.size());
    const std::vector<float> logits = model->Run({{&c.prompt, 0, length, &blocks}});
    ASSERT_EQ(c.first_logits.size(), model->vocab());
    EXPECT_LT(RelativeL2(std::span(logits).last(model->vocab()), c.first_logits), limits.logits);
  }
}

// Runs a sequence through the engine's runner in chunks, then token by token.
class Generation {
 public:
  Generation(Engine* engine, const ReferenceCase& reference)
      : engine_(engine), tokens_(reference.prompt), prompt_length_(reference.prompt.size()) {
    params_.temperature = 0;
    params_.logprobs = 2;
    params_.prompt_logprobs = 1;
    params_.repetition_penalty = 1;
    auto lease = engine->pool().Reserve(
        (static_cast<int>(tokens_.size()) + 40) / engine->options().block_size + 1);
    EXPECT_OK(lease);
    if (lease.ok()) lease_ = *std::move(lease);
  }

  absl::Status Step(int num_tokens) {
    Batch batch;
    BatchItem& item = batch.items.emplace_back();
    item.tokens = tokens_;
    item.start = computed_;
    item.num_tokens = num_tokens;
    item.prompt_length = static_cast<int>(prompt_length_);
    item.block_table = lease_.blocks();
    const bool last = static_cast<size_t>(computed_ + num_tokens) == tokens_.size();
    item.sampling = last ? &params_ : nullptr;
    item.prompt_logprobs = static_cast<size_t>(computed_) < prompt_length_ ? 1 : -1;
    absl::StatusOr<StepOutput> out = engine_->runner().Run(batch);
    if (!out.ok()) return out.status();
    computed_ += num_tokens;
    for (const TokenLogprob& l : out->items[0].prompt_logprobs) prompt_logprobs_.push_back(l);
    EXPECT_EQ(out->items[0].has_token, last);
    if (last) {
      generated_.push_back(out->items[0].token);
      tokens_.push_back(out->items[0].token.token);
    }
    return absl::OkStatus();
  }

  int left() const { return static_cast<int>(tokens_.size()) - computed_; }
  const std::vector<TokenLogprob>& generated() const { return generated_; }
  const std::vector<TokenLogprob>& prompt_logprobs() const { return prompt_logprobs_; }

 private:
  Engine* engine_;
  std::vector<int32_t> tokens_;
  const size_t prompt_length_;
  int computed_ = 0;
  SamplingParams params_;
  BlockLease lease_;
  std::vector<TokenLogprob> generated_;
  std::vector<TokenLogprob> prompt_logprobs_;
};

void CheckGeneration(const std::string& dir, const Limits& limits, EngineOptions options = {}) {
  options.device = "cpu";
  options.model_dir = dir;
  options.dtype = limits.dtype;
  options.kv_cache_dtype = limits.kv_cache_dtype;
  options.kv_cache_memory_bytes = 16 << 20;
  auto engine = Engine::Load(options);
  ASSERT_OK(engine);
  for (const ReferenceCase& c : LoadReferenceCases(dir)) {
    SCOPED_TRACE(fmt::format("prompt of {} tokens", c.prompt.size()));
    Generation run(engine->get(), c);
    while (run.generated().empty()) ASSERT_OK(run.Step(std::min(37, run.left())));
    ASSERT_EQ(run.prompt_logprobs().size(), c.prompt.size() - 1);
    for (size_t i = 0; i + 1 < c.prompt.size(); ++i) {
      const TokenLogprob& got = run.prompt_logprobs()[i];
      EXPECT_EQ(got.token, c.prompt[i + 1]);
      EXPECT_NEAR(got.logprob, c.prompt_logprobs[i], Tolerance(limits, c.prompt_logprobs[i]))
          << "position " << i + 1;
      ASSERT_EQ(got.top.size(), 1u);
      EXPECT_GE(got.top[0].logprob, got.logprob);
    }
    if (c.min_margin <= limits.margin) continue;
    while (run.generated().size() < c.greedy.size()) ASSERT_OK(run.Step(1));
    for (size_t i = 0; i < c.greedy.size(); ++i) {
      const TokenLogprob& got = run.generated()[i];
      EXPECT_EQ(got.token, c.greedy[i]) << "token " << i;
      EXPECT_NEAR(got.logprob, c.greedy_logprobs[i], Tolerance(limits, c.greedy_logprobs[i]))
          << "token " << i;
      ASSERT_EQ(got.top.size(), 2u);
      EXPECT_EQ(got.top[0].token, got.token);
    }
  }
}

void CheckAll(const std::string& folder, const Limits& limits, size_t at_least) {
  const std::vector<std::string> models = ReferenceModels(folder);
  ASSERT_GE(models.size(), at_least);
  for (const std::string& dir : models) {
    SCOPED_TRACE(dir);
    ASSERT_FALSE(LoadReferenceCases(dir).empty());
    CheckLogits(dir, limits);
    CheckGeneration(dir, limits);
  }
}

TEST(ReferenceTest, FixturesFloat32) { CheckAll(SourcePath("tests/data/engine"), kFloat32, 7); }

TEST(ReferenceTest, FixturesBFloat16) {
  if (!CpuHasBF16()) GTEST_SKIP() << "this CPU has no bfloat16 arithmetic";
  CheckAll(SourcePath("tests/data/engine"), kBFloat16, 7);
}

TEST(ReferenceTest, FixturesKvInFp8) { CheckAll(SourcePath("tests/data/engine"), kFp8Kv, 7); }

// Three query heads for each KV head: a fourth of zeros changes nothing.
TEST(ReferenceTest, PaddedQueryHeadsFloat32) {
  EngineOptions options;
  options.pad_query_heads = true;
  CheckGeneration(SourcePath("tests/data/engine/qwen2-gqa"), kFloat32, options);
}

TEST(ReferenceTest, TwoRanks) {
  EngineOptions options;
  options.tensor_parallel_size = 2;
  for (const char* name : {"qwen3-gqa", "mistral-nowindow"}) {
    SCOPED_TRACE(name);
    const std::string dir = SourcePath(std::string("tests/data/engine/") + name);
    for (const Limits& limits : {kFloat32, kFp8Kv}) CheckGeneration(dir, limits, options);
  }
}

TEST(ReferenceTest, SharedModelsFloat32) {
  TANDEM_REQUIRE_SHARED();
  CheckAll(SharedDir() + "/reference", kFloat32, 5);
}

TEST(ReferenceTest, SharedModelsBFloat16) {
  TANDEM_REQUIRE_SHARED();
  if (!CpuHasBF16()) GTEST_SKIP() << "this CPU has no bfloat16 arithmetic";
  CheckAll(SharedDir() + "/reference", kBFloat16, 5);
}

}  // namespace
}  // namespace tandem::engine
