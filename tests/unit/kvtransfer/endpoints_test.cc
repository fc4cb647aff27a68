// Both ends over loopback TCP: what a transfer does when nothing or something ordinary goes wrong.
#include <algorithm>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem {
namespace {

using ::testing::HasSubstr;

TEST(KvEndpoints, ShipsBlocksAndSeals) {
  Ends ends;
  ends.Start();
  const TransferId id = TransferId::Random();
  const std::vector<int32_t> from = {3, 4, 5, 9};
  const std::vector<int32_t> to = {7, 8, 1, 30};
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, to)));
  ends.PushAll(id, 1, from);
  ends.sender->Finish(id, 1);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed, 1);
  EXPECT_EQ(got.failed, 0);
  EXPECT_EQ(got.stats.bytes, 4 * SmallLayout().BlockBytes());
  EXPECT_EQ(got.stats.transport, "tcp");
  EXPECT_LE(got.stats.first_byte, got.stats.last_byte);
  ends.ExpectEqualBlocks(from, to);
  const Record::Sender sent = ends.record.AwaitDone(id, 1);
  EXPECT_OK(sent.status);
  EXPECT_EQ(sent.stats.bytes, got.stats.bytes);
  EXPECT_EQ(ends.sender->Counters().transfers, 1);
  EXPECT_EQ(ends.receiver->Counters().transfers, 1);
  // Nothing else of the target pool was touched.
  for (const int block : {0, 2, 6, 9, 29, 31}) {
    EXPECT_EQ(ends.target.BlockBytes(block), std::string(SmallLayout().BlockBytes(), '\xee'));
  }
}

}  // namespace
}  // namespace tandem
