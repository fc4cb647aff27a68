// Thousands of steps with sequences that join, leave, are cancelled and preempted at random: no
// token that the CPU would not have drawn, and no memory of the card lost.
#include <algorithm>
#include <cstdlib>
#include <cuda_runtime.h>
#include <deque>
#include <list>
#include <memory>
#include <random>
#include <vector>

#include "fmt/format.h"
#include "gtest/gtest.h"

#include "engine/runtime/backend.h"
#include "engine/runtime/engine.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

constexpr int kSteps = 10000;  // or TANDEM_SOAK_STEPS, where a sanitizer makes each of them slow
constexpr int kMaxRows = 256, kMaxItems = 32;
constexpr int kVocab = 512;
constexpr int kVerified = 250;  // sequences that the CPU computes again
// Of the CPU's log probabilities: how far below its best token the card's may lie, whose products
// are in bfloat16.
constexpr float kMargin = 0.1f;

int NumSteps() {
  const char* steps = std::getenv("TANDEM_SOAK_STEPS");
  return steps != nullptr ? std::atoi(steps) : kSteps;
}

EngineOptions Options(const std::string& device) {
  EngineOptions options;
  options.model_dir = SourcePath("tests/data/models/slow");
  options.load_format = "dummy";
  options.device = device;
  options.dtype = device == "cpu" ? "float32" : "bfloat16";
  options.max_model_len = 1024;
  options.max_num_batched_tokens = device == "cpu" ? 1024 : kMaxRows;
  options.max_num_seqs = kMaxItems;
  // Too little for all that may run at once.
  options.kv_cache_memory_bytes = device == "cpu" ? 64 << 20 : 5120 * 16 * 250;
  return options;
}

struct Sequence {
  std::vector<int32_t> tokens;  // that the host knows
  int prompt = 0;
  int known = 0;     // tokens that are computed like a prompt: more than that after a preemption
  int computed = 0;  // positions launched
  int wanted = 0;    // tokens to draw
  int drawn = 0;     // draws launched
  int in_flight = 0;
  bool leaving = false;  // cancelled or preempted: waits for its steps
  bool cancelled = false;
  SamplingParams params;
  DrawnToken pending;
  BlockLease lease;

  bool greedy() const { return params.temperature == 0; }
};

class Soak {
 public:
  Soak(Engine* engine, uint64_t seed) : engine_(engine), random_(static_cast<unsigned>(seed)) {}

  void Run(int steps) {
    for (int i = 0; i < steps && !testing::Test::HasFailure(); ++i) {
      Disturb();
      if (!Launch()) {
        if (launched_.empty()) continue;
        Collect();
      }
      if (static_cast<int>(launched_.size()) == engine_->runner().max_in_flight()) Collect();
    }
    while (!launched_.empty() && !testing::Test::HasFailure()) Collect();
    running_.clear();
  }

  std::vector<Sequence> finished;
  int cancelled = 0, preempted = 0, tokens = 0, launches = 0;

 private:
  struct Launched {
    StepId id;
    std::vector<std::pair<Sequence*, bool>> items;  // with whether it draws
  };

  int Pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }

  void Disturb() {
    if (running_.size() < 4 || (running_.size() < 48 && Pick(0, 9) < 2)) Join();
    if (running_.empty()) return;
    const int what = Pick(0, 99);
    if (what >= 3) return;
    Sequence& s = *std::next(running_.begin(), Pick(0, static_cast<int>(running_.size()) - 1));
    if (s.leaving) return;
    s.leaving = true;
    s.cancelled = what == 0;
  }

  void Join() {
    Sequence& s = running_.emplace_back();
    s.prompt = s.known = Pick(0, 9) == 0 ? Pick(300, 700) : Pick(1, 120);
    for (int i = 0; i < s.prompt; ++i) s.tokens.push_back(Pick(0, kVocab - 1));
    s.wanted = Pick(1, 60);
    s.params.temperature = 0;
    if (Pick(0, 9) < 3) {
      s.params.temperature = 0.9f;
      s.params.top_p = 0.9f;
      s.params.top_k = Pick(0, 40);
      s.params.repetition_penalty = 1.1f;
      s.params.frequency_penalty = 0.2f;
      s.params.seed = random_();
      s.params.logprobs = Pick(-1, 5);
    }
  }

  // Gives back what sequences that leave hold, once none of their steps is in flight.
  void Settle() {
    for (auto it = running_.begin(); it != running_.end();) {
      Sequence& s = *it;
      const bool done = s.drawn == s.wanted;
      if (s.in_flight > 0 || !(done || s.leaving)) {
        ++it;
        continue;
      }
      s.lease.Release();
      if (done || s.cancelled) {
        done ? finished.push_back(std::move(s)) : void(++cancelled);
        it = running_.erase(it);
        continue;
      }
      ++preempted;
      s.leaving = false;
      s.computed = 0;
      s.known = static_cast<int>(s.tokens.size());
      s.pending = {};
      ++it;
    }
  }

  bool HasBlocks(Sequence* s, int end) {
    const int more = BlocksFor(end, engine_->options().block_size) - s->lease.size();
    if (more <= 0) return true;
    auto lease = engine_->pool().Reserve(more);
    if (!lease.ok()) return false;
    s->lease.Append(*std::move(lease));
    return true;
  }

  // False where nothing can be launched.
  bool Launch() {
    Settle();
    Batch batch;
    batch.wants_layer_events = Pick(0, 3) == 0;
    Launched launched;
    int rows = kMaxRows;
    bool starved = false;
    for (Sequence& s : running_) {
      if (rows == 0 || batch.items.size() == kMaxItems) break;
      if (s.leaving || s.drawn == s.wanted || Pick(0, 19) == 0) continue;
      const bool decodes = s.computed >= s.known;
      // Its last token is known to the host, or drawn by the very step before.
      if (decodes && s.pending.step != 0 && s.pending.step != last_) continue;
      const int count = decodes ? 1 : std::min({Pick(1, 150), rows, s.known - s.computed});
      if (!HasBlocks(&s, s.computed + count)) {
        starved = true;
        continue;
      }
      BatchItem& item = batch.items.emplace_back();
      item.tokens = s.tokens;
      item.start = s.computed;
      item.num_tokens = count;
      item.prompt_length = std::min(s.prompt, static_cast<int>(s.tokens.size()));
      item.block_table = s.lease.blocks();
      if (decodes) item.pending = s.pending;
      const bool draws = s.computed + count >= s.known;
      item.sampling = draws ? &s.params : nullptr;
      s.computed += count;
      rows -= count;
      launched.items.push_back({&s, draws});
    }
    // Who came last makes room, as in the worker's loop.
    if (starved && !running_.empty()) running_.back().leaving = true;
    if (batch.items.empty()) return false;
    const auto step = engine_->runner().Launch(batch);
    if (!step.ok()) {
      ADD_FAILURE() << step.status();
      return false;
    }
    launched.id = last_ = step->id;
    for (size_t i = 0; i < launched.items.size(); ++i) {
      auto& [s, draws] = launched.items[i];
      ++s->in_flight;
      if (!draws) continue;
      ++s->drawn;
      s->pending = {step->id, static_cast<int>(i)};
    }
    launched_.push_back(std::move(launched));
    ++launches;
    return true;
  }

  void Collect() {
    const Launched launched = std::move(launched_.front());
    launched_.pop_front();
    const auto output = engine_->runner().Collect(launched.id);
    if (!output.ok()) {
      ADD_FAILURE() << output.status();
      return;
    }
    for (size_t i = 0; i < launched.items.size(); ++i) {
      auto [s, draws] = launched.items[i];
      --s->in_flight;
      EXPECT_TRUE(output->items[i].status.ok()) << output->items[i].status;
      EXPECT_EQ(output->items[i].has_token, draws);
      if (!draws) continue;
      const int32_t token = output->items[i].token.token;
      EXPECT_TRUE(token >= 0 && token < kVocab) << token;
      s->tokens.push_back(token);
      if (s->pending.step == launched.id) s->pending = {};
      ++tokens;
    }
  }

  Engine* engine_;
  std::mt19937 random_;
  std::list<Sequence> running_;
  std::deque<Launched> launched_;
  StepId last_ = 0;
};

// The worst of a sequence's greedy tokens: how far below the CPU's best its log probability lies.
float WorstMargin(Engine* cpu, const Sequence& s) {
  const int length = static_cast<int>(s.tokens.size());
  const auto lease = cpu->pool().Reserve(BlocksFor(length, cpu->options().block_size));
  if (!lease.ok()) {
    ADD_FAILURE() << lease.status();
    return 0;
  }
  Batch batch;
  BatchItem& item = batch.items.emplace_back();
  item.tokens = s.tokens;
  item.num_tokens = item.prompt_length = length;
  item.block_table = lease->blocks();
  item.prompt_logprobs = 1;
  const auto output = cpu->runner().Run(batch);
  if (!output.ok() || !output->items[0].status.ok()) {
    ADD_FAILURE() << output.status();
    return 0;
  }
  float worst = 0;
  for (int i = s.prompt; i < length; ++i) {
    const TokenLogprob& scored = output->items[0].prompt_logprobs[static_cast<size_t>(i) - 1];
    EXPECT_EQ(scored.token, s.tokens[static_cast<size_t>(i)]);
    worst = std::max(worst, scored.top[0].logprob - scored.logprob);
  }
  return worst;
}

TEST(CudaSoakTest, NoWrongTokenAndNoLostMemory) {
  if (const auto backend = OpenBackend("cuda", {}); !backend.ok()) {
    GTEST_SKIP() << backend.status().ToString();
  }
  auto engine = Engine::Load(Options("cuda"));
  ASSERT_OK(engine);
  const int blocks = (*engine)->pool().NumAvailable();
  {
    Soak warm(engine->get(), 1);  // whatever is only taken once
    warm.Run(NumSteps() / 20);
  }
  size_t before = 0, after = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  Soak soak(engine->get(), 2);
  soak.Run(NumSteps());
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  if (NumSteps() == kSteps) {  // sanitizers take memory of their own
    EXPECT_GE(after + (size_t{4} << 20), before) << "the card's memory shrinks";
  }
  fmt::print("{} steps, {} tokens; sequences finished {}, cancelled {}, preempted {}\n",
             soak.launches, soak.tokens, soak.finished.size(), soak.cancelled, soak.preempted);
  // 10,000 steps finish 1,961 sequences, cancel 93 and preempt 195.
  EXPECT_GT(soak.finished.size(), static_cast<size_t>(NumSteps() / 20));
  EXPECT_GT(soak.cancelled, NumSteps() / 500);
  EXPECT_GT(soak.preempted, NumSteps() / 500);

  auto cpu = Engine::Load(Options("cpu"));
  ASSERT_OK(cpu);
  int verified = 0, drawn = 0;
  float worst = 0;
  for (const Sequence& s : soak.finished) {
    EXPECT_EQ(static_cast<int>(s.tokens.size()), s.prompt + s.wanted);
    if (!s.greedy() || verified == kVerified) continue;
    const float margin = WorstMargin(cpu->get(), s);
    EXPECT_LT(margin, kMargin) << "prompt of " << s.prompt << ", " << s.wanted << " drawn";
    worst = std::max(worst, margin);
    ++verified;
    drawn += s.wanted;
  }
  fmt::print("{} greedy sequences with {} tokens beside the CPU: at worst {:.4f} below its best\n",
             verified, drawn, worst);
  EXPECT_GT(verified, std::min(100, NumSteps() / 20));
  EXPECT_EQ((*engine)->pool().NumAvailable(), blocks);
}

}  // namespace
}  // namespace tandem::engine
