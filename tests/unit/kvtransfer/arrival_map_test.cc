#include "kvtransfer/channel/arrival_map.h"

#include "gtest/gtest.h"

namespace tandem::kvtransfer {
namespace {

TEST(ArrivalMap, IsCompleteWhenEveryPageIsThereAndEveryHeadFinished) {
  ArrivalMap map(/*num_blocks=*/2, /*num_layers=*/1, HeadRange{4, 2});
  EXPECT_TRUE(map.Finish({4, 1}, {1, 3}));
  EXPECT_TRUE(map.Add(0, 0, 4, 1));
  EXPECT_TRUE(map.Add(0, 1, 4, 3));
  EXPECT_TRUE(map.Add(0, 0, 5, 2));
  EXPECT_FALSE(map.Complete());
  EXPECT_TRUE(map.Add(0, 1, 5, 4));
  EXPECT_FALSE(map.Complete()) << "head 5 was not finished";
  EXPECT_TRUE(map.Finish({5, 1}, {2, 4}));
  EXPECT_TRUE(map.Complete());
  EXPECT_EQ(map.FirstMismatch(), -1);
}

TEST(ArrivalMap, CountsNothingTwice) {
  ArrivalMap map(1, 2, HeadRange{0, 1});
  EXPECT_TRUE(map.Add(0, 0, 0, 7));
  EXPECT_FALSE(map.Add(0, 0, 0, 8));
  EXPECT_TRUE(map.Has(0, 0, 0));
  EXPECT_FALSE(map.Has(1, 0, 0));
  EXPECT_TRUE(map.Finish({0, 1}, {7 ^ 1}));
  EXPECT_FALSE(map.Finish({0, 1}, {9}));
  EXPECT_TRUE(map.Add(1, 0, 0, 1));
  EXPECT_TRUE(map.Complete());
  EXPECT_EQ(map.FirstMismatch(), -1);
}

TEST(ArrivalMap, NamesTheFirstBlockThatIsNotWhatWasSent) {
  ArrivalMap map(3, 1, HeadRange{0, 1});
  for (size_t ordinal = 0; ordinal < 3; ++ordinal) map.Add(0, ordinal, 0, ordinal);
  EXPECT_TRUE(map.Finish({0, 1}, {0, 9, 9}));
  EXPECT_EQ(map.FirstMismatch(), 1);
}

TEST(ArrivalMap, ATransferWithoutBlocksIsCompleteOnceFinished) {
  ArrivalMap map(0, 4, HeadRange{0, 2});
  EXPECT_FALSE(map.Complete());
  EXPECT_TRUE(map.Finish({0, 2}, {}));
  EXPECT_TRUE(map.Complete());
}

}  // namespace
}  // namespace tandem::kvtransfer
