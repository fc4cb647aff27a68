#include "engine/runtime/step_input.h"

#include <cstring>
#include <span>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "engine/device/cpu/cpu_device.h"
#include "engine/runtime/decode_sizes.h"
#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

template <typename T>
std::vector<T> Values(const T* data, int count) {
  return std::vector<T>(data, data + count);
}

class StepInputTest : public ::testing::Test {
 protected:
  static constexpr int kBlockSize = 4;

  // Sequences of 3, 6 and 9 tokens, of which the last one is computed.
  Batch Decode(int count) const {
    Batch batch;
    for (int i = 0; i < count; ++i) {
      BatchItem& item = batch.items.emplace_back();
      item.tokens = std::span(tokens_).first(static_cast<size_t>(3 * i + 3));
      item.start = 3 * i + 2;
      item.num_tokens = 1;
      item.prompt_length = 2;
      item.block_table = std::span(blocks_).subspan(static_cast<size_t>(i) * 3, 3);
      item.sampling = &sampling_;
    }
    return batch;
  }

  CpuDevice device_{{.num_threads = 1}};
  std::vector<int32_t> tokens_ = {10, 11, 12, 13, 14, 15, 16, 17, 18};
  std::vector<int32_t> blocks_ = {70, 71, 72, 80, 81, 82, 90, 91, 92};
  SamplingParams sampling_;
  StepInput input_ = StepInput::Create({8, 8, 3, 16}, &device_).value();
};

TEST_F(StepInputTest, ItemsLieOneAfterTheOther) {
  input_.Fill(Decode(3), kBlockSize);
  const StepView view = input_.host();
  EXPECT_EQ(input_.shape(), (StepShape{3, 3, 3}));
  EXPECT_THAT(Values(view.batch.token_ids, 3), ElementsAre(12, 15, 18));
  EXPECT_THAT(Values(view.batch.positions, 3), ElementsAre(2, 5, 8));
  EXPECT_THAT(Values(view.batch.starts, 3), ElementsAre(2, 5, 8));
  EXPECT_THAT(Values(view.batch.first_rows, 4), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(Values(view.batch.first_blocks, 4), ElementsAre(0, 1, 3, 6));
  EXPECT_THAT(Values(view.batch.blocks, 6), ElementsAre(70, 80, 81, 90, 91, 92));
  EXPECT_EQ(view.batch.max_length, 9);
  EXPECT_EQ(view.batch.max_item_rows, 1);
}

TEST_F(StepInputTest, PaddingHasRowsButNoPositions) {
  input_.Fill(Decode(2), kBlockSize, 5);
  const StepView view = input_.host();
  EXPECT_EQ(input_.shape(), (StepShape{5, 5, 5}));
  EXPECT_EQ(input_.num_items(), 2);
  EXPECT_EQ(input_.wanted().size(), 2u);
  EXPECT_THAT(Values(view.batch.starts, 5), ElementsAre(2, 5, -1, -1, -1));
  EXPECT_THAT(Values(view.batch.token_ids, 5), ElementsAre(12, 15, 0, 0, 0));
  EXPECT_THAT(Values(view.batch.first_rows, 6), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(Values(view.batch.first_blocks, 6), ElementsAre(0, 1, 3, 3, 3, 3));
  EXPECT_THAT(Values(view.logit_rows, 5), ElementsAre(0, 1, 2, 3, 4));
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(view.specs[i].item, i);
    EXPECT_EQ(view.specs[i].history_begin, view.specs[i].history_end);
  }
  EXPECT_EQ(view.specs[4].temperature, 0.0f);
}

TEST_F(StepInputTest, PlacesDependOnTheShapeAlone) {
  sampling_.repetition_penalty = 1.1f;
  input_.Fill(Decode(3), kBlockSize, 4);
  const StepView three = input_.host();
  input_.Fill(Decode(1), kBlockSize, 4);
  const StepView one = input_.host();
  EXPECT_EQ(one.batch.blocks, three.batch.blocks);
  EXPECT_EQ(one.specs, three.specs);
  EXPECT_EQ(one.token_lists, three.token_lists);
}

TEST_F(StepInputTest, ACopyOfTheBytesIsTheWholeStep) {
  sampling_.repetition_penalty = 1.1f;
  sampling_.min_tokens = 100;
  sampling_.stop_token_ids = {5, 6};
  Batch batch = Decode(3);
  batch.items[2].pending = {1, 1};  // its last token; `tokens` are those before
  batch.items[2].tokens = batch.items[2].tokens.first(8);
  input_.Fill(batch, kBlockSize, 4);
  std::vector<std::byte> copy(input_.bytes());
  std::memcpy(copy.data(), input_.data(), copy.size());
  const StepView view = input_.ViewAt(copy.data());
  const DrawSpec& spec = view.specs[2];
  EXPECT_EQ(view.batch.token_ids[2], PendingId(1));
  const int32_t* lists = view.token_lists;
  EXPECT_THAT(Values(lists + spec.masked_begin, spec.masked_end - spec.masked_begin),
              ElementsAre(5, 6));
  EXPECT_THAT(Values(lists + spec.history_begin, spec.history_end - spec.history_begin),
              ElementsAre(10, 11, 12, 13, 14, 15, 16, 17, PendingId(1)));
  EXPECT_EQ(spec.output_begin, spec.history_begin + 2);
  EXPECT_THAT(Values(view.batch.blocks, 6), ElementsAre(70, 80, 81, 90, 91, 92));
  EXPECT_EQ(reinterpret_cast<const std::byte*>(lists + spec.history_end),
            copy.data() + copy.size());
}

TEST_F(StepInputTest, ListsOfAnyLengthFit) {
  sampling_.min_tokens = 100;
  sampling_.stop_token_ids.assign(100000, 7);
  input_.Fill(Decode(2), kBlockSize);
  const StepView view = input_.host();
  EXPECT_THAT(Values(view.token_lists + view.specs[1].masked_begin, 100000), Each(7));
}

TEST(DecodeSizesTest, AscendToTheLargest) {
  EXPECT_THAT(DecodeSizes(0), ElementsAre());
  EXPECT_THAT(DecodeSizes(1), ElementsAre(1));
  EXPECT_THAT(DecodeSizes(5), ElementsAre(1, 2, 4, 5));
  EXPECT_THAT(DecodeSizes(256), ElementsAre(1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112,
                                            128, 160, 192, 224, 256));
}

TEST(DecodeSizesTest, AStepIsPaddedToTheNextSize) {
  const std::vector<int> sizes = DecodeSizes(20);
  EXPECT_EQ(DecodeSizeFor(1, sizes), 1);
  EXPECT_EQ(DecodeSizeFor(3, sizes), 4);
  EXPECT_EQ(DecodeSizeFor(17, sizes), 20);
  EXPECT_EQ(DecodeSizeFor(21, sizes), 0);
  EXPECT_EQ(DecodeSizeFor(1, {}), 0);
}

}  // namespace
}  // namespace tandem::engine
