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
                            int layer, const HeadRange& heads = {0, 2}) {
  auto plan = BuildCopyPlan(Shape(10), Shape(20), {layer, 1, heads, from, to});
  EXPECT_OK(plan);
  return plan.value_or(std::vector<CopyPiece>{});
}

TEST(CopyPlan, MergesWhatIsAdjacentInBothPools) {
  ASSERT_EQ(kLayout.BlockLayerBytes(), 1024u);
  EXPECT_THAT(Plan({3, 4, 5}, {7, 8, 9}, 0), ElementsAre(CopyPiece{3072, 7168, 3072}));
}

TEST(CopyPlan, DoesNotMergeWhatIsAdjacentInOnePoolOnly) {
  EXPECT_THAT(Plan({3, 4}, {7, 9}, 0),
              ElementsAre(CopyPiece{3072, 7168, 1024}, CopyPiece{4096, 9216, 1024}));
  EXPECT_THAT(Plan({3, 5}, {7, 8}, 0),
              ElementsAre(CopyPiece{3072, 7168, 1024}, CopyPiece{5120, 8192, 1024}));
  EXPECT_THAT(Plan({4, 3}, {8, 7}, 0),
              ElementsAre(CopyPiece{4096, 8192, 1024}, CopyPiece{3072, 7168, 1024}));
}

TEST(CopyPlan, LayersLieWhereEachPoolHasThem) {
  EXPECT_THAT(Plan({3}, {7}, 1), ElementsAre(CopyPiece{(10 + 3) * 1024, (20 + 7) * 1024, 1024}));
}

TEST(CopyPlan, SeveralLayersFollowOneAnother) {
  const std::vector<int32_t> from = {3};
  const std::vector<int32_t> to = {7};
  EXPECT_THAT(
      *BuildCopyPlan(Shape(10), Shape(20), {0, 2, {0, 2}, from, to}),
      ElementsAre(CopyPiece{3072, 7168, 1024}, CopyPiece{(10 + 3) * 1024, (20 + 7) * 1024, 1024}));
  EXPECT_THAT(*BuildCopyPlan(Shape(10), Shape(20), {2, 0, {0, 2}, from, to}), ElementsAre());
  // The last block of a layer and the first of the next are neighbours in memory.
  const std::vector<int32_t> only = {0};
  EXPECT_THAT(*BuildCopyPlan(Shape(1), Shape(1), {0, 2, {0, 2}, only, only}),
              ElementsAre(CopyPiece{0, 0, 2048}));
}

TEST(CopyPlan, SomeHeadsAreOnePieceOfKeysAndOneOfValues) {
  EXPECT_THAT(Plan({3}, {7}, 0, {1, 1}), ElementsAre(CopyPiece{3072 + 256, 7168 + 256, 256},
                                                     CopyPiece{3072 + 768, 7168 + 768, 256}));
}

TEST(CopyPlan, PoolsOfOtherTensorParallelismShareTheHeadsTheyBothHold) {
  // All four heads of the model in one pool, heads 2 and 3 in the other.
  KvPoolShape whole = Shape(10);
  whole.layout.num_kv_heads = 4;
  KvPoolShape half = Shape(20);
  half.first_head = 2;
  EXPECT_EQ(Intersect(whole.heads(), half.heads()), (HeadRange{2, 2}));
  const std::vector<int32_t> from = {1};
  const std::vector<int32_t> to = {5};
  EXPECT_THAT(*BuildCopyPlan(whole, half, {0, 1, {2, 2}, from, to}),
              ElementsAre(CopyPiece{2048 + 512, 5120, 512}, CopyPiece{2048 + 1536, 5632, 512}));
  EXPECT_THAT(BuildCopyPlan(whole, half, {0, 1, {1, 2}, from, to}).status().ToString(),
              HasSubstr("heads [1, 3) are not within those of both pools"));
}

TEST(CopyPlan, NothingToCopy) { EXPECT_THAT(Plan({}, {}, 0), ElementsAre()); }

TEST(CopyPlan, RefusesWhatDoesNotFit) {
  const auto error = [](const std::vector<int32_t>& from, const std::vector<int32_t>& to,
                        int layer) {
    const auto plan = BuildCopyPlan(Shape(10), Shape(20), {layer, 1, {0, 2}, from, to});
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(plan.status().message());
  };
  EXPECT_THAT(error({0, 10}, {0, 1}, 0), HasSubstr("source_blocks[1] must be in [0, 10), got 10"));
  EXPECT_THAT(error({0}, {20}, 0), HasSubstr("target_blocks[0] must be in [0, 20), got 20"));
  EXPECT_THAT(error({-1}, {0}, 0), HasSubstr("got -1"));
  EXPECT_THAT(error({1, 2}, {1}, 0), HasSubstr("2 source blocks for 1 target"));
  EXPECT_THAT(error({1}, {1}, 2), HasSubstr("layers [2, 2 + 1) are not within the layout's 2"));
  EXPECT_THAT(error({1}, {1}, -1), HasSubstr("layer"));
  KvPoolShape other = Shape(20);
  other.layout.head_dim = 16;
  EXPECT_THAT(BuildCopyPlan(Shape(10), other, {}).status().ToString(),
              HasSubstr("KV head_dim: source has 8, target has 16"));
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
  const Hello hello = {"decode-3", "abc", {kLayout, 77, 4}, {{"shm", "boot name"}, {"tcp", ""}}};
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

TEST(Hello, NamesItsWorker) {
  const absl::Status nameless = ValidateHello({"", "abc", {kLayout, 77}, {}});
  EXPECT_EQ(nameless.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(nameless.message(), HasSubstr("worker_id must not be empty"));
}

TEST(Hello, SaysWhatDiffers) {
  const Hello here = {"decode-0", "abc", {kLayout, 77}, {}};
  Hello peer = here;
  peer.worker_id = "prefill-0";
  peer.shape.num_blocks = 5;
  EXPECT_OK(CheckCompatible(here, peer));
  peer.shape.layout.block_size = 32;
  EXPECT_EQ(std::string(CheckCompatible(here, peer).message()),
            "KV block_size: decode-0 has 16, prefill-0 has 32");
  peer.shape.layout = kLayout;
  peer.shape.layout.dtype = DType::kFloat32;
  EXPECT_EQ(std::string(CheckCompatible(here, peer).message()),
            "KV dtype: decode-0 has bfloat16, prefill-0 has float32");
  peer.shape.layout = kLayout;
  peer.shape.first_head = 1;
  EXPECT_EQ(std::string(CheckCompatible(here, peer).message()),
            "KV heads: decode-0 needs [0, 2), prefill-0 has [1, 3)");
  peer.shape.first_head = 0;
  peer.shape.layout.num_kv_heads = 4;  // more than needed: it sends a part
  EXPECT_OK(CheckCompatible(here, peer));
  peer.shape.layout = kLayout;
  peer.capability_digest = "abd";
  EXPECT_EQ(std::string(CheckCompatible(here, peer).message()),
            "capability digest of decode-0 and prefill-0 differ: model, dtype, quantization, block "
            "size or protocol version");
}

}  // namespace
}  // namespace tandem::kvtransfer
