// The contract of ModelRunner at depth 2, held by the fakes that the loops are tested with.
#include <algorithm>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "simulation/delayed_model_runner.h"
#include "simulation/fake_model_runner.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::HasSubstr;

constexpr int kBlocksOfEach = 8;

// One sequence of the least loop there can be.
struct TestSequence {
  std::vector<int32_t> tokens;
  int prompt_length = 0;
  std::vector<int32_t> blocks;
  SamplingParams sampling;

  std::vector<int32_t> generated() const { return {tokens.begin() + prompt_length, tokens.end()}; }
};

class LaunchCollectTest : public ::testing::Test {
 protected:
  LaunchCollectTest() : memory_(64), inner_(memory_.region(), {.max_in_flight = 2}) {}

  void UseDelays() {
    delayed_ = std::make_unique<DelayedModelRunner>(&inner_, [this] {
      return absl::Microseconds(300 * (++delays_ % 4));  // steps overlap in every way
    });
  }
  ModelRunner& runner() {
    return delayed_ != nullptr ? static_cast<ModelRunner&>(*delayed_) : inner_;
  }

  TestSequence Sequence(int number, int prompt_length) {
    TestSequence s;
    for (int i = 0; i < prompt_length; ++i) s.tokens.push_back((number * 131 + i * 17) % 1000);
    s.prompt_length = prompt_length;
    for (int b = 0; b < kBlocksOfEach; ++b) s.blocks.push_back(number * kBlocksOfEach + b);
    s.sampling.temperature = number % 2 == 0 ? 0.0f : 1.0f;
    s.sampling.seed = static_cast<uint64_t>(number);
    s.sampling.max_tokens = 20;
    return s;
  }
  static BatchItem Item(const TestSequence& s, int start) {
    BatchItem item;
    item.tokens = s.tokens;
    item.start = start;
    item.num_tokens = item.length() - start;
    item.prompt_length = s.prompt_length;
    item.block_table = s.blocks;
    item.sampling = &s.sampling;
    return item;
  }
  static BatchItem Following(const TestSequence& s, DrawnToken pending, int length) {
    BatchItem item = Item(s, 0);
    item.pending = pending;
    item.start = length;
    item.num_tokens = 1;
    return item;
  }
  static std::vector<int32_t> Expected(const TestSequence& s, int tokens) {
    SamplingParams sampling = s.sampling;
    sampling.max_tokens = tokens;
    return FakeReferenceTokens(std::span(s.tokens).first(static_cast<size_t>(s.prompt_length)),
                               sampling, 1 << 20);
  }

  FakeKvMemory memory_;
  FakeModelRunner inner_;
  int delays_ = 0;
  std::unique_ptr<DelayedModelRunner> delayed_;
};

TEST_F(LaunchCollectTest, AStepTakesItsTokensFromTheStepInFlight) {
  UseDelays();
  std::vector<TestSequence> sequences = {Sequence(0, 5), Sequence(1, 20), Sequence(2, 33)};
  Batch batch;
  for (const TestSequence& s : sequences) batch.items.push_back(Item(s, 0));
  auto step = runner().Launch(batch);
  ASSERT_OK(step);
  for (int round = 0; round < 20; ++round) {
    Batch next;
    for (size_t i = 0; i < sequences.size(); ++i) {
      const TestSequence& s = sequences[i];
      next.items.push_back(
          Following(s, {step->id, static_cast<int>(i)}, static_cast<int>(s.tokens.size())));
    }
    const auto following = runner().Launch(next);
    ASSERT_OK(following);
    const auto out = runner().Collect(step->id);
    ASSERT_OK(out);
    for (size_t i = 0; i < sequences.size(); ++i) {
      sequences[i].tokens.push_back(out->items[i].token.token);
    }
    step = following;
  }
  ASSERT_OK(runner().Collect(step->id));
  for (const TestSequence& s : sequences) EXPECT_EQ(s.generated(), Expected(s, 20));
}

TEST_F(LaunchCollectTest, InputsMayChangeOnceTheyAreLaunched) {
  UseDelays();
  TestSequence s = Sequence(1, 20);
  const std::vector<int32_t> expected = Expected(s, 1);
  Batch batch;
  batch.items.push_back(Item(s, 0));
  const auto step = runner().Launch(batch);
  ASSERT_OK(step);
  std::fill(s.tokens.begin(), s.tokens.end(), 7);
  std::fill(s.blocks.begin(), s.blocks.end(), 63);
  s.sampling = {};
  batch.items.clear();
  const auto out = runner().Collect(step->id);
  ASSERT_OK(out);
  EXPECT_EQ(out->items[0].token.token, expected[0]);
}

TEST_F(LaunchCollectTest, LayerEventsComeTrueWhileTheStepIsComputed) {
  UseDelays();
  const TestSequence s = Sequence(1, 20);
  Batch batch;
  batch.wants_layer_events = true;
  batch.items.push_back(Item(s, 0));
  const auto step = runner().Launch(batch);
  ASSERT_OK(step);
  ASSERT_EQ(step->layer_ready.size(), 2u);
  for (const auto& event : step->layer_ready) {
    EXPECT_TRUE(event->WaitFor(absl::InfiniteDuration()));  // nobody has collected yet
  }
  EXPECT_OK(runner().Collect(step->id));
}

TEST_F(LaunchCollectTest, NoEventIsTrueBeforeTheWorkBegins) {
  const TestSequence s = Sequence(1, 20);
  Batch batch;
  batch.wants_layer_events = true;
  batch.items.push_back(Item(s, 0));
  const auto step = runner().Launch(batch);  // the fake alone computes inside Collect
  ASSERT_OK(step);
  for (const auto& event : step->layer_ready) EXPECT_FALSE(event->Ready());
  ASSERT_OK(runner().Collect(step->id));
  for (const auto& event : step->layer_ready) EXPECT_TRUE(event->Ready());
}

TEST_F(LaunchCollectTest, AnAbandonedStepReleasesWhoWaitsForItsEvents) {
  const TestSequence s = Sequence(1, 20);
  Batch batch;
  batch.wants_layer_events = true;
  batch.items.push_back(Item(s, 0));
  std::vector<std::shared_ptr<const ReadyEvent>> events;
  {
    FakeModelRunner short_lived(memory_.region(), {});
    const auto step = short_lived.Launch(batch);
    ASSERT_OK(step);
    events = step->layer_ready;
  }
  for (const auto& event : events) EXPECT_TRUE(event->Ready());
}

TEST_F(LaunchCollectTest, AFailedDrawFailsTheStepThatWasToFollowIt) {
  FakeModelOptions options{.max_in_flight = 2};
  options.item_status = [](const BatchItem& item) {
    return item.prompt_length == 20 ? absl::InternalError("NaN") : absl::OkStatus();
  };
  FakeModelRunner runner(memory_.region(), options);
  const TestSequence good = Sequence(0, 5), bad = Sequence(1, 20);
  Batch batch, next;
  batch.items = {Item(bad, 0), Item(good, 0)};
  const auto step = runner.Launch(batch);
  ASSERT_OK(step);
  next.items = {Following(good, {step->id, 1}, 5), Following(bad, {step->id, 0}, 20)};
  const auto following = runner.Launch(next);
  ASSERT_OK(following);
  ASSERT_OK(runner.Collect(step->id));
  const auto out = runner.Collect(following->id);
  ASSERT_OK(out);
  EXPECT_EQ(out->items[0].token.token, Expected(good, 2)[1]);
  EXPECT_THAT(out->items[1].status.ToString(), HasSubstr("NaN"));
  EXPECT_FALSE(out->items[1].has_token);
}

TEST_F(LaunchCollectTest, APendingTokenMustBeDrawnByTheStepBefore) {
  const TestSequence s = Sequence(1, 20);
  Batch batch;
  batch.items.push_back(Item(s, 0));
  const auto step = runner().Launch(batch);
  ASSERT_OK(step);
  const auto error = [&](DrawnToken pending) {
    Batch next;
    next.items.push_back(Following(s, pending, 20));
    return runner().Launch(next).status().ToString();
  };
  EXPECT_THAT(error({step->id, 1}), HasSubstr("does not draw"));
  EXPECT_THAT(error({step->id + 1, 0}), HasSubstr("does not draw"));
  EXPECT_THAT(error({step->id, -1}), HasSubstr("does not draw"));
}

}  // namespace
}  // namespace tandem::engine
