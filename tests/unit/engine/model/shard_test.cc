#include "engine/model/shard.h"

#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem::engine {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<float> Values(const TensorView& view) {
  const auto* values = reinterpret_cast<const float*>(view.data);
  return {values, values + view.bytes / sizeof(float)};
}

TEST(ShardTest, RowsAreReadInPlaceAndColumnsAreCopied) {
  const std::vector<float> values = {0, 1, 2, 3, 4, 5, 6, 7};
  const TensorView view{Element::kFloat32,
                        {2, 4},
                        reinterpret_cast<const std::byte*>(values.data()),
                        values.size() * sizeof(float)};
  MemoryBlock memory;
  const TensorView rows = ShardOf(view, 0, {1, 2}, &memory);
  EXPECT_THAT(rows.shape, ElementsAre(1, 4));
  EXPECT_THAT(Values(rows), ElementsAre(4, 5, 6, 7));
  EXPECT_EQ(rows.data, view.data + 4 * sizeof(float));
  const TensorView columns = ShardOf(view, 1, {1, 2}, &memory);
  EXPECT_THAT(columns.shape, ElementsAre(2, 2));
  EXPECT_THAT(Values(columns), ElementsAre(2, 3, 6, 7));
}

TEST(ShardTest, EveryTensorOfALayerIsSplitOrKept) {
  for (const char* rows : {"q_proj.weight", "k_proj.bias", "v_proj.weight", "gate_proj.weight",
                           "up_proj.bias", "up_proj.weight"}) {
    EXPECT_EQ(ShardedDimension(std::string("layers.0.") + rows), 0u) << rows;
  }
  for (const char* columns : {"o_proj.weight", "down_proj.weight"}) {
    EXPECT_EQ(ShardedDimension(std::string("layers.0.") + columns), 1u) << columns;
  }
  for (const char* kept : {"q_norm.weight", "input_layernorm.weight", "o_proj.bias"}) {
    EXPECT_EQ(ShardedDimension(std::string("layers.0.") + kept), std::nullopt) << kept;
  }
  EXPECT_TRUE(BelongsToTheFirstRank("layers.0.mlp.down_proj.bias"));
  EXPECT_FALSE(BelongsToTheFirstRank("layers.0.mlp.up_proj.bias"));
}

TEST(ShardTest, TheDescriptionNamesWhatTheRanksDoNotDivide) {
  ModelConfig config;
  config.num_heads = 28;
  config.num_kv_heads = 4;
  config.intermediate_size = 18944;
  const auto half = ShardOf(config, {1, 2});
  ASSERT_OK(half);
  EXPECT_EQ(half->num_heads, 14);
  EXPECT_EQ(half->num_kv_heads, 2);
  EXPECT_EQ(half->intermediate_size, 9472);
  EXPECT_THAT(ShardOf(config, {0, 8}).status().ToString(),
              HasSubstr("--tensor-parallel-size=8 does not divide the model's KV heads (4)"));
  config.intermediate_size = 18945;
  EXPECT_THAT(ShardOf(config, {0, 2}).status().ToString(), HasSubstr("intermediate_size (18945)"));
}

}  // namespace
}  // namespace tandem::engine
