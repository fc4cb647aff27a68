// A sequence's tokens do not depend on how many steps are in flight, nor on a device that works
// behind the host's back.
#include "engine/runtime/decoder_runner.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "engine/runtime/backend.h"
#include "tests/fakes/deferred_backend.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

constexpr int kBlockSize = 16, kBlocksEach = 8, kSequences = 5;
constexpr int kChunk = 13;  // prompt tokens of one sequence in one step

struct RunnerUnderTest {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Ops> ops;
  std::unique_ptr<Decoder> decoder;
  Buffer pool;
  std::unique_ptr<DecoderRunner> runner;

  static absl::StatusOr<RunnerUnderTest> Make(std::unique_ptr<Backend> backend, int max_in_flight) {
    const std::string dir = SourcePath("tests/data/engine/qwen2-gqa");
    RunnerUnderTest test;
    test.backend = std::move(backend);
    Device& device = test.backend->device();
    TANDEM_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::Load(dir));
    DecoderRunner::Options options;
    options.max_num_batched_tokens = kSequences * kChunk;
    options.max_num_seqs = kSequences;
    options.max_model_len = kBlocksEach * kBlockSize;
    options.valid_vocab_size = 150;
    options.max_in_flight = max_in_flight;
    const DecoderLimits limits = DecoderRunner::LimitsOf(options);
    TANDEM_ASSIGN_OR_RETURN(test.ops,
                            test.backend->MakeOps(OpsShapeOf(config, Element::kFloat32, limits)));
    TANDEM_ASSIGN_OR_RETURN(
        ModelWeights weights,
        LoadModelWeights(config, {dir, false, 0, Element::kFloat32, 1}, &device, test.ops.get()));
    TANDEM_ASSIGN_OR_RETURN(
        test.decoder, Decoder::Create(config, std::move(weights), limits, &device, test.ops.get()));
    KvRegion kv;
    kv.layout = config.LayoutFor(kBlockSize, DType::kFloat32);
    kv.num_blocks = kSequences * kBlocksEach;
    TANDEM_ASSIGN_OR_RETURN(test.pool, device.AllocateKvPool(kv.TotalBytes()));
    kv.base = test.pool.as<std::byte>();
    TANDEM_ASSIGN_OR_RETURN(test.runner, DecoderRunner::Create(options, kv, &device,
                                                               test.decoder.get(), test.ops.get()));
    return test;
  }
};

// One sequence of a small loop, which keeps as many steps in flight as its runner allows.
struct Sequence {
  std::vector<int32_t> tokens;  // known to the host
  int prompt_length = 0;
  std::vector<int32_t> blocks;
  SamplingParams sampling;
  int launched = 0;       // positions that are computed, or will be by steps in flight
  DrawnToken last_drawn;  // by a step in flight
  bool ended = false;     // a stop token was seen
  std::vector<float> logprobs;

  int length() const { return static_cast<int>(tokens.size()) + (last_drawn.step != 0 ? 1 : 0); }
  bool complete() const { return ended || length() - prompt_length >= sampling.max_tokens; }
};

std::vector<Sequence> MakeSequences() {
  std::vector<Sequence> sequences(kSequences);
  for (int i = 0; i < kSequences; ++i) {
    Sequence& s = sequences[static_cast<size_t>(i)];
    s.prompt_length = 3 + 11 * i;
    for (int p = 0; p < s.prompt_length; ++p) s.tokens.push_back((i * 31 + p * 7) % 150);
    for (int b = 0; b < kBlocksEach; ++b) s.blocks.push_back(i + b * kSequences);
    s.sampling.temperature = i % 2 == 0 ? 0.0f : 0.9f;
    s.sampling.seed = static_cast<uint64_t>(i);
    s.sampling.max_tokens = 12 + i;
    s.sampling.logprobs = 2;
    s.sampling.frequency_penalty = i >= 2 ? 0.7f : 0.0f;  // needs the token still in flight
    s.sampling.min_tokens = 4;
    for (int32_t id = 0; id < 150; id += 9) s.sampling.stop_token_ids.push_back(id);
  }
  return sequences;
}

struct InFlight {
  StepId id = 0;
  std::vector<Sequence*> sequences;  // by item
  std::vector<bool> draws;
};

absl::StatusOr<InFlight> LaunchNext(ModelRunner* runner, std::vector<Sequence>* sequences) {
  Batch batch;
  InFlight step;
  for (Sequence& s : *sequences) {
    const int left = s.length() - s.launched;
    if (left <= 0 || s.ended || (s.launched >= s.prompt_length && s.complete())) continue;
    BatchItem& item = batch.items.emplace_back();
    item.tokens = s.tokens;
    item.start = s.launched;
    item.num_tokens = std::min(left, kChunk);
    item.prompt_length = s.prompt_length;
    item.block_table = s.blocks;
    item.pending = s.last_drawn;
    s.launched += item.num_tokens;
    const bool draws = s.launched == s.length();
    item.sampling = draws ? &s.sampling : nullptr;
    step.sequences.push_back(&s);
    step.draws.push_back(draws);
  }
  if (batch.items.empty()) return step;
  TANDEM_ASSIGN_OR_RETURN(const LaunchedStep launched, runner->Launch(batch));
  step.id = launched.id;
  return step;
}

// Tokens and log probabilities of all sequences.
absl::Status Generate(ModelRunner* runner, std::vector<Sequence>* sequences) {
  std::deque<InFlight> in_flight;
  while (true) {
    TANDEM_ASSIGN_OR_RETURN(InFlight next, LaunchNext(runner, sequences));
    // The tokens it draws are the ones that the step after it may take.
    for (size_t i = 0; i < next.sequences.size(); ++i) {
      if (!next.draws[i]) continue;
      Sequence& s = *next.sequences[i];
      s.last_drawn = {next.id, static_cast<int>(i)};
    }
    const bool launched = !next.sequences.empty();
    if (launched) in_flight.push_back(std::move(next));
    if (in_flight.empty()) return absl::OkStatus();
    if (launched && static_cast<int>(in_flight.size()) < runner->max_in_flight()) continue;
    const InFlight step = std::move(in_flight.front());
    in_flight.pop_front();
    TANDEM_ASSIGN_OR_RETURN(const StepOutput out, runner->Collect(step.id));
    for (size_t i = 0; i < step.sequences.size(); ++i) {
      TANDEM_RETURN_IF_ERROR(out.items[i].status);
      Sequence& s = *step.sequences[i];
      if (!step.draws[i] || s.ended) continue;  // the surplus token of a sequence that had ended
      if (s.last_drawn.step == step.id) s.last_drawn = {};
      s.tokens.push_back(out.items[i].token.token);
      s.logprobs.push_back(out.items[i].token.logprob);
      const int generated = static_cast<int>(s.tokens.size()) - s.prompt_length;
      s.ended = generated >= s.sampling.min_tokens && s.tokens.back() % 9 == 0;
    }
  }
}

void ExpectSameAsCpu(std::unique_ptr<Backend> backend, int max_in_flight, bool recorded = false,
                     int more_stop_tokens = 0) {
  std::vector<Sequence> sequences = MakeSequences();
  for (Sequence& s : sequences) {
    s.sampling.stop_token_ids.insert(s.sampling.stop_token_ids.end(),
                                     static_cast<size_t>(more_stop_tokens), 0);
  }
  auto cpu = RunnerUnderTest::Make(OpenBackend("cpu", {.num_threads = 1}).value(), 1);
  ASSERT_OK(cpu);
  std::vector<Sequence> expected = sequences;
  ASSERT_OK(Generate(cpu->runner.get(), &expected));
  auto other = RunnerUnderTest::Make(std::move(backend), max_in_flight);
  ASSERT_OK(other);
  if (recorded) other->runner->RecordDecodeSteps();
  std::vector<Sequence> got = sequences;
  ASSERT_OK(Generate(other->runner.get(), &got));
  int ended = 0;
  for (size_t i = 0; i < kSequences; ++i) {
    SCOPED_TRACE(i);
    EXPECT_EQ(got[i].tokens, expected[i].tokens);
    EXPECT_EQ(got[i].logprobs, expected[i].logprobs);
    ended += got[i].ended ? 1 : 0;
  }
  EXPECT_GT(ended, 0);  // some end with a step in flight, some at their length
  EXPECT_LT(ended, kSequences);
}

TEST(DecoderRunnerTest, TwoStepsInFlightGiveTheSameTokens) {
  ExpectSameAsCpu(OpenBackend("cpu", {.num_threads = 1}).value(), 2);
}

TEST(DecoderRunnerTest, ADeviceThatWorksLaterGivesTheSameTokens) {
  ExpectSameAsCpu(MakeDeferredBackend([] { return absl::ZeroDuration(); }), 2);
}

TEST(DecoderRunnerTest, ADeviceThatLagsFarBehindGivesTheSameTokens) {
  int n = 0;
  ExpectSameAsCpu(MakeDeferredBackend([&n] { return absl::Microseconds(++n % 17 == 0 ? 500 : 0); }),
                  2);
}

TEST(DecoderRunnerTest, RecordedStepsGiveTheSameTokens) {
  // 5 sequences that end one after the other: sizes of 5, 4, 4 (one of them padding), 2 and 1.
  ExpectSameAsCpu(MakeDeferredBackend([] { return absl::ZeroDuration(); }), 2, true);
}

TEST(DecoderRunnerTest, StepsAreRecordedAgainWhereTheirInputsOutgrowTheMemory) {
  ExpectSameAsCpu(MakeDeferredBackend([] { return absl::ZeroDuration(); }), 2, true, 20000);
}

TEST(DecoderRunnerTest, WithoutGraphsNothingIsRecorded) {
  ExpectSameAsCpu(OpenBackend("cpu", {.num_threads = 1}).value(), 2, true);
}

TEST(DecoderRunnerTest, LayersAreReadyOnlyWhenTheDeviceHasComputedThem) {
  absl::Mutex mutex;
  bool open = true;  // while weights are loaded
  auto test = RunnerUnderTest::Make(MakeDeferredBackend([&] {
                                      mutex.LockWhen(absl::Condition(&open));
                                      mutex.Unlock();
                                      return absl::ZeroDuration();
                                    }),
                                    1);
  ASSERT_OK(test);
  {
    absl::MutexLock lock(&mutex);
    open = false;
  }
  const std::vector<int32_t> tokens = {1, 2, 3}, blocks = {0};
  Batch batch;
  batch.wants_layer_events = true;
  batch.items.push_back({tokens, 0, 3, 3, blocks, nullptr, -1});
  const auto step = test->runner->Launch(batch);
  ASSERT_OK(step);
  ASSERT_FALSE(step->layer_ready.empty());
  for (const auto& event : step->layer_ready) EXPECT_FALSE(event->Ready());
  {
    absl::MutexLock lock(&mutex);
    open = true;
  }
  for (const auto& event : step->layer_ready) {
    EXPECT_TRUE(event->WaitFor(absl::InfiniteDuration()));  // nobody has collected yet
  }
  EXPECT_OK(test->runner->Collect(step->id));
}

TEST(DecoderRunnerTest, StepsThatNeverBeganReleaseWhoWaitsForTheirLayers) {
  auto test = RunnerUnderTest::Make(OpenBackend("cpu", {.num_threads = 1}).value(), 1);
  ASSERT_OK(test);
  const std::vector<int32_t> tokens = {1, 2, 3}, blocks = {0};
  Batch batch;
  batch.wants_layer_events = true;
  batch.items.push_back({tokens, 0, 3, 3, blocks, nullptr, -1});
  const auto step = test->runner->Launch(batch);
  ASSERT_OK(step);
  test->runner.reset();
  for (const auto& event : step->layer_ready) EXPECT_TRUE(event->Ready());
}

// ---- drafts ----

// What comes next in `s`, as far as `expected` tells, with one token in four wrong.
std::vector<int32_t> DraftFor(const Sequence& s, const Sequence& expected, std::mt19937* random) {
  const size_t room =
      static_cast<size_t>(s.prompt_length + s.sampling.max_tokens) - s.tokens.size();
  const size_t length = std::min<size_t>((*random)() % 5, room - 1);
  std::vector<int32_t> draft;
  for (size_t i = 0; i < length; ++i) {
    const size_t at = s.tokens.size() + i;
    const bool right = at < expected.tokens.size() && (*random)() % 4 != 0;
    draft.push_back(right ? expected.tokens[at] : static_cast<int32_t>((*random)() % 150));
  }
  return draft;
}

struct DraftedRun {
  int accepted = 0;
  int rejected = 0;
};

// Generate() with a draft for every decode step.
absl::StatusOr<DraftedRun> GenerateDrafted(ModelRunner* runner, std::vector<Sequence>* sequences,
                                           const std::vector<Sequence>& expected, uint32_t seed) {
  std::mt19937 random(seed);
  DraftedRun run;
  while (true) {
    Batch batch;
    std::vector<Sequence*> items;
    std::vector<std::vector<int32_t>> drafts(sequences->size());
    for (size_t i = 0; i < sequences->size(); ++i) {
      Sequence& s = (*sequences)[i];
      if (s.complete()) continue;
      const int left = s.length() - s.launched;
      BatchItem& item = batch.items.emplace_back();
      if (left == 1) drafts[i] = DraftFor(s, expected[i], &random);
      item.tokens = s.tokens;
      item.draft = drafts[i];
      item.start = s.launched;
      item.num_tokens = std::min(left + static_cast<int>(drafts[i].size()), kChunk);
      item.prompt_length = s.prompt_length;
      item.block_table = s.blocks;
      s.launched += item.num_tokens;
      if (s.launched == item.length()) item.sampling = &s.sampling;
      items.push_back(&s);
    }
    if (batch.items.empty()) return run;
    TANDEM_ASSIGN_OR_RETURN(const StepOutput out, runner->Run(batch));
    for (size_t i = 0; i < items.size(); ++i) {
      const ItemOutput& output = out.items[i];
      TANDEM_RETURN_IF_ERROR(output.status);
      if (batch.items[i].sampling == nullptr) continue;
      Sequence& s = *items[i];
      std::vector<TokenLogprob> drawn = output.further;
      drawn.insert(drawn.begin(), output.token);
      run.accepted += static_cast<int>(output.further.size());
      run.rejected += static_cast<int>(batch.items[i].draft.size() - output.further.size());
      for (const TokenLogprob& token : drawn) {
        if (s.complete()) break;
        s.tokens.push_back(token.token);
        s.logprobs.push_back(token.logprob);
        const int generated = static_cast<int>(s.tokens.size()) - s.prompt_length;
        s.ended = generated >= s.sampling.min_tokens && token.token % 9 == 0;
      }
      s.launched = static_cast<int>(s.tokens.size()) - 1;
    }
  }
}

// Greedy and sampled, with penalties, ends that are masked at first, and other sequences' chunks.
TEST(DecoderRunnerTest, DraftsGiveTheSameTokensAndLogprobs) {
  auto test = RunnerUnderTest::Make(OpenBackend("cpu", {.num_threads = 2}).value(), 1);
  ASSERT_OK(test);
  std::vector<Sequence> expected = MakeSequences();
  ASSERT_OK(Generate(test->runner.get(), &expected));
  int accepted = 0, rejected = 0;
  for (uint32_t seed = 0; seed < 10; ++seed) {
    SCOPED_TRACE(seed);
    std::vector<Sequence> got = MakeSequences();
    const auto run = GenerateDrafted(test->runner.get(), &got, expected, seed);
    ASSERT_OK(run);
    for (size_t i = 0; i < kSequences; ++i) {
      SCOPED_TRACE(i);
      EXPECT_EQ(got[i].tokens, expected[i].tokens);
      EXPECT_EQ(got[i].logprobs, expected[i].logprobs);
    }
    accepted += run->accepted;
    rejected += run->rejected;
  }
  EXPECT_GT(accepted, 50);
  EXPECT_GT(rejected, 50);
}

TEST(DecoderRunnerTest, ADraftNeedsATokenBeforeItAndADraw) {
  auto test = RunnerUnderTest::Make(OpenBackend("cpu", {.num_threads = 1}).value(), 1);
  ASSERT_OK(test);
  const std::vector<int32_t> tokens = {1, 2, 3}, draft = {4, 5}, blocks = {0};
  const SamplingParams sampling;
  Batch batch;
  BatchItem& item = batch.items.emplace_back();
  item.tokens = tokens;
  item.draft = draft;
  item.num_tokens = 5;
  item.prompt_length = 3;
  item.block_table = blocks;
  EXPECT_TRUE(absl::IsInvalidArgument(test->runner->Run(batch).status()));
  item.sampling = &sampling;
  EXPECT_OK(test->runner->Run(batch));
  item.start = 3;
  item.num_tokens = 2;
  EXPECT_TRUE(absl::IsInvalidArgument(test->runner->Run(batch).status()));
  const std::vector<int32_t> unknown = {4, 1 << 20};
  item.start = 0;
  item.num_tokens = 5;
  item.draft = unknown;
  EXPECT_TRUE(absl::IsInvalidArgument(test->runner->Run(batch).status()));
}

}  // namespace
}  // namespace tandem::engine
