#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kvtransfer/channel/hello.h"
#include "kvtransfer/plan/copy_plan.h"
#include "tests/support/paths.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const KvLayout kLayout = {2, 2, 8, 16, DType::kBFloat16};  // 1,024 bytes per block and layer
constexpr KvPoolShape Shape(int num_blocks) { return {kLayout, num_blocks}; }

std::vector<CopyPiece> Plan(const std::vector<int32_t>& from, const std::vector<int32_t>& to,
                            int layer_begin, int layer_count) {
  auto plan = BuildCopyPlan(Shape(10), Shape(20), from, to, layer_begin, layer_count);
  EXPECT_OK(plan);
  return plan.value_or(std::vector<CopyPiece>{});
}

TEST(CopyPlan, MergesWhatIsAdjacentInBothPools) {
  ASSERT_EQ(kLayout.BlockLayerBytes(), 1024u);
  EXPECT_THAT(Plan({3, 4, 5}, {7, 8, 9}, 0, 1), ElementsAre(CopyPiece{3072, 7168, 3072}));
}

TEST(CopyPlan, DoesNotMergeWhatIsAdjacentInOnePoolOnly) {
  EXPECT_THAT(Plan({3, 4}, {7, 9}, 0, 1),
              ElementsAre(CopyPiece{3072, 7168, 1024}, CopyPiece{4096, 9216, 1024}));
  EXPECT_THAT(Plan({3, 5}, {7, 8}, 0, 1),
              ElementsAre(CopyPiece{3072, 7168, 1024}, CopyPiece{5120, 8192, 1024}));
  EXPECT_THAT(Plan({4, 3}, {8, 7}, 0, 1),
              ElementsAre(CopyPiece{4096, 8192, 1024}, CopyPiece{3072, 7168, 1024}));
}

TEST(CopyPlan, LayersLieWhereEachPoolHasThem) {
  EXPECT_THAT(Plan({3}, {7}, 1, 1), ElementsAre(CopyPiece{(10 + 3) * 1024, (20 + 7) * 1024, 1024}));
  EXPECT_THAT(Plan({3}, {7}, 0, 2), ElementsAre(CopyPiece{3072, 7168, 1024},
                                                CopyPiece{(10 + 3) * 1024, (20 + 7) * 1024, 1024}));
  // The last block of a layer and the first of the next are neighbours in memory.
  EXPECT_THAT(
      *BuildCopyPlan(Shape(1), Shape(1), std::vector<int32_t>{0}, std::vector<int32_t>{0}, 0, 2),
      ElementsAre(CopyPiece{0, 0, 2048}));
}

TEST(CopyPlan, NothingToCopy) {
  EXPECT_THAT(Plan({}, {}, 0, 2), ElementsAre());
  EXPECT_THAT(Plan({1}, {1}, 2, 0), ElementsAre());
}

TEST(CopyPlan, RefusesWhatDoesNotFit) {
  const auto error = [](const std::vector<int32_t>& from, const std::vector<int32_t>& to, int begin,
                        int count) {
    const auto plan = BuildCopyPlan(Shape(10), Shape(20), from, to, begin, count);
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(plan.status().message());
  };
  EXPECT_THAT(error({0, 10}, {0, 1}, 0, 1),
              HasSubstr("source_blocks[1] must be in [0, 10), got 10"));
  EXPECT_THAT(error({0}, {20}, 0, 1), HasSubstr("target_blocks[0] must be in [0, 20), got 20"));
  EXPECT_THAT(error({-1}, {0}, 0, 1), HasSubstr("got -1"));
  EXPECT_THAT(error({1, 2}, {1}, 0, 1), HasSubstr("2 source blocks for 1 target"));
  EXPECT_THAT(error({1}, {1}, 1, 2), HasSubstr("not within the layout's 2"));
  EXPECT_THAT(error({1}, {1}, -1, 1), HasSubstr("layers"));
  KvPoolShape other = Shape(20);
  other.layout.head_dim = 16;
  EXPECT_THAT(BuildCopyPlan(Shape(10), other, {}, {}, 0, 1).status().ToString(),
              HasSubstr("different layouts"));
}

TEST(CopyPlan, ImpossibleLayouts) {
  KvLayout layout = kLayout;
  layout.num_layers = 0;
  EXPECT_THAT(ValidateLayout(layout).ToString(), HasSubstr("num_layers"));
  layout = kLayout;
  layout.head_dim = 1 << 20;
  EXPECT_THAT(ValidateLayout(layout).ToString(), HasSubstr("head_dim"));
  layout = kLayout;
  layout.block_size = 1 << 16;
  layout.head_dim = 1 << 16;
  EXPECT_THAT(ValidateLayout(layout).ToString(), HasSubstr("smaller block_size"));
}

TEST(OrdinalRuns, AreMaximalAndBounded) {
  EXPECT_THAT(SplitIntoRuns(std::vector<int32_t>{4, 5, 6, 8, 7, 8}, 10),
              ElementsAre(OrdinalRun{0, 3}, OrdinalRun{3, 1}, OrdinalRun{4, 2}));
  EXPECT_THAT(SplitIntoRuns(std::vector<int32_t>{0, 1, 2, 3, 4}, 2),
              ElementsAre(OrdinalRun{0, 2}, OrdinalRun{2, 2}, OrdinalRun{4, 1}));
  EXPECT_THAT(SplitIntoRuns({}, 2), ElementsAre());
}

TEST(Hello, RoundTrip) {
  const Hello hello = {"decode-3", "abc", kLayout, 77};
  const std::string encoded = EncodeHello(hello);
  const auto decoded = DecodeHello(std::as_bytes(std::span(encoded)));
  ASSERT_OK(decoded);
  EXPECT_EQ(*decoded, hello);
  // No prefix of it, nor anything longer, is a hello.
  for (size_t size = 0; size < encoded.size(); ++size) {
    EXPECT_FALSE(DecodeHello(std::as_bytes(std::span(encoded)).first(size)).ok()) << size;
  }
  const std::string longer = encoded + "x";
  EXPECT_FALSE(DecodeHello(std::as_bytes(std::span(longer))).ok());
}

TEST(Hello, SaysWhatDiffers) {
  const Hello here = {"decode-0", "abc", kLayout, 77};
  Hello peer = here;
  peer.worker_id = "prefill-0";
  peer.num_blocks = 5;
  EXPECT_OK(CheckCompatible(here, peer));
  peer.layout.block_size = 32;
  EXPECT_EQ(std::string(CheckCompatible(here, peer).message()),
            "KV block_size: decode-0 has 16, prefill-0 has 32");
  peer.layout = kLayout;
  peer.layout.dtype = DType::kFloat32;
  EXPECT_EQ(std::string(CheckCompatible(here, peer).message()),
            "KV dtype: decode-0 has bfloat16, prefill-0 has float32");
  peer.layout = kLayout;
  peer.capability_digest = "abd";
  EXPECT_EQ(std::string(CheckCompatible(here, peer).message()),
            "capability digest: decode-0 has abc, prefill-0 has abd");
}

}  // namespace
}  // namespace tandem::kvtransfer
