// A pool in pieces is one pool to everybody else: bytes, digests and transfers.
#include "kvtransfer/store/sharded_store.h"

#include <memory>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

KvLayout Heads(int count) { return KvLayout{3, count, 8, 16, DType::kBFloat16}; }

// Pieces of a pool with these numbers of heads.
struct Pieces {
  explicit Pieces(const std::vector<int>& heads, int num_blocks = 12) {
    int first = 0;
    for (const int count : heads) {
      pools.push_back(std::make_unique<TestPool>(Heads(count), num_blocks, first));
      first += count;
    }
  }
  std::vector<KvRegion> regions() const {
    std::vector<KvRegion> regions;
    for (const auto& pool : pools) regions.push_back(pool->region());
    return regions;
  }
  std::unique_ptr<KvStore> Store() const {
    auto store = MakeKvStore({}, regions());
    EXPECT_OK(store.status());
    return store.ok() ? *std::move(store) : nullptr;
  }
  std::string BlockBytes(int layer, int block, PageKind kind, int head) const {
    for (const auto& pool : pools) {
      const KvPoolShape shape = ShapeOf(pool->region());
      if (head >= shape.heads().end()) continue;
      const auto at = shape.PageOffset(layer, block, kind, head);
      return {reinterpret_cast<const char*>(pool->region().base + at), shape.layout.PageBytes()};
    }
    return "";
  }

  std::vector<std::unique_ptr<TestPool>> pools;
};

// All pages of some blocks are those of others.
void ExpectEqualPages(const Pieces& a, const std::vector<int32_t>& of_a, const Pieces& b,
                      const std::vector<int32_t>& of_b, int heads) {
  for (int layer = 0; layer < 3; ++layer) {
    for (size_t i = 0; i < of_a.size(); ++i) {
      for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
        for (int head = 0; head < heads; ++head) {
          EXPECT_TRUE(a.BlockBytes(layer, of_a[i], kind, head) ==
                      b.BlockBytes(layer, of_b[i], kind, head))
              << "layer " << layer << " block " << i << " head " << head;
        }
      }
    }
  }
}

// Fills pieces from a whole pool of random bytes.
void Fill(const KvStore& from, const KvStore& to, int num_blocks) {
  BlockRun run{0, 3, {0, from.shape().layout.num_kv_heads}, {}, {}};
  std::vector<int32_t> blocks;
  for (int i = 0; i < num_blocks; ++i) blocks.push_back(i);
  run.source_blocks = run.target_blocks = blocks;
  std::vector<std::byte> bytes(run.Bytes(from.shape().layout));
  std::vector<uint64_t> digests(blocks.size(), 0);
  from.GatherRun(run, bytes.data(), digests);
  // In the order of the plan, so all of a whole pool's layers one behind the other.
  uint64_t at = 0;
  std::vector<CopyPiece> pieces;
  for (int layer = 0; layer < 3; ++layer) {
    const uint64_t layer_bytes = blocks.size() * from.shape().layout.BlockLayerBytes();
    pieces.push_back({at, to.shape().BlockOffset(layer, 0), layer_bytes});
    at += layer_bytes;
  }
  to.Scatter(bytes.data(), pieces);
}

TEST(ShardedStore, IsOnePoolOfBytesAndDigests) {
  const Pieces whole({4});
  whole.pools[0]->FillRandom(3);
  const HostStore one(whole.pools[0]->region());
  for (const std::vector<int>& heads : {std::vector{2, 2}, {1, 1, 1, 1}, {3, 1}}) {
    const Pieces pieces(heads);
    const auto store = pieces.Store();
    ASSERT_NE(store, nullptr);
    EXPECT_EQ(store->shape(), one.shape());
    Fill(one, *store, 12);
    ExpectEqualPages(whole, {0, 5, 11}, pieces, {0, 5, 11}, 4);
    for (const HeadRange range : {HeadRange{0, 4}, {1, 2}, {3, 1}, {0, 1}}) {
      const std::vector<int32_t> blocks = {7, 2, 3, 11};
      const BlockRun run{1, 2, range, blocks, {}};
      EXPECT_EQ(store->DigestRun(run), one.DigestRun(run));
      std::vector<std::byte> a(run.Bytes(one.shape().layout)), b(a.size());
      std::vector<uint64_t> of_a(4, 1), of_b(4, 1);
      one.GatherRun(run, a.data(), of_a);
      store->GatherRun(run, b.data(), of_b);
      EXPECT_TRUE(a == b);
      EXPECT_EQ(of_a, of_b);
    }
  }
}

// Bytes that came in parts of any size.
TEST(ShardedStore, TakesPartsOfPages) {
  const Pieces whole({4}), pieces({1, 3});
  whole.pools[0]->FillRandom(4);
  const HostStore one(whole.pools[0]->region());
  const auto store = pieces.Store();
  const uint64_t total = one.shape().TotalBytes();
  for (uint64_t at = 0, step = 1; at < total; at += step, step = step * 7 % 1021 + 1) {
    const uint64_t bytes = std::min(step, total - at);
    const CopyPiece piece{0, at, bytes};
    store->Scatter(whole.pools[0]->region().base + at, {&piece, 1});
  }
  ExpectEqualPages(whole, {0, 6, 11}, pieces, {0, 6, 11}, 4);
  std::vector<std::byte> back(total);
  const CopyPiece all{0, 0, total};
  store->Gather({&all, 1}, back.data());
  EXPECT_TRUE(std::equal(back.begin(), back.end(), whole.pools[0]->memory().begin()));
}

TEST(ShardedStore, HasTheBlocksThatAllPiecesHave) {
  const TestPool a(Heads(1), 9, 0), b(Heads(1), 7, 1);
  const std::vector<KvRegion> regions = {a.region(), b.region()};
  const auto store = MakeKvStore({}, regions);
  ASSERT_OK(store.status());
  EXPECT_EQ((*store)->shape().num_blocks, 7);
}

TEST(ShardedStore, RefusesPiecesThatDoNotFit) {
  const TestPool first(Heads(2), 4, 0), gap(Heads(2), 4, 3);
  EXPECT_THAT(MakeKvStore({}, std::vector{first.region(), gap.region()}).status().ToString(),
              HasSubstr("piece 1 of the KV pool"));
  const TestPool other(KvLayout{3, 2, 16, 16, DType::kBFloat16}, 4, 2);
  EXPECT_THAT(MakeKvStore({}, std::vector{first.region(), other.region()}).status().ToString(),
              HasSubstr("another layout"));
  EXPECT_THAT(MakeKvStore({}, std::vector{first.region()}).status().ToString(),
              HasSubstr("needs two"));
}

struct Split {
  std::vector<int> sender, receiver;
  const char* transports;
  const char* carrier;
};
class ShardedEnds : public testing::TestWithParam<Split> {};

// Workers whose models are split in different ways.
TEST_P(ShardedEnds, ShipToEachOther) {
  const Split& split = GetParam();
  Pieces source(split.sender), target(split.receiver);
  for (size_t i = 0; i < source.pools.size(); ++i) source.pools[i]->FillRandom(10 + i);
  Ends ends(split.transports, Heads(4), 12, 12);
  ends.sender_options.region = source.pools[0]->region();
  if (source.pools.size() > 1) ends.sender_options.shards = source.regions();
  ends.receiver_options.region = target.pools[0]->region();
  if (target.pools.size() > 1) ends.receiver_options.shards = target.regions();
  ends.Start();
  const std::vector<int32_t> from = {3, 1, 9, 4}, to = {0, 8, 2, 11};
  const TransferId id = TransferId::Random();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, to)));
  ends.PushAll(id, 1, from);
  ends.sender->Finish(id, 1);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed, 1) << got.status;
  EXPECT_EQ(got.stats.transport, split.carrier);
  ExpectEqualPages(source, from, target, to, 4);
}

INSTANTIATE_TEST_SUITE_P(All, ShardedEnds,
                         testing::Values(Split{{2, 2}, {4}, "tcp", "tcp"},
                                         Split{{4}, {2, 2}, "tcp", "tcp"},
                                         Split{{2, 2}, {1, 1, 1, 1}, "tcp", "tcp"},
                                         Split{{2, 2}, {4}, "auto", "shm_ring"},
                                         Split{{4}, {1, 3}, "auto", "shm_ring"}));

}  // namespace
}  // namespace tandem::kvtransfer
