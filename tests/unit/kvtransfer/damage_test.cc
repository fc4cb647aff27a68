// One bit of a transfer is damaged, by bad memory say, on its way or where it lies: over every
// transport, wherever it happens, the blocks are never sealed. 10,000 seeded bits in all.
#include <atomic>
#include <random>

#include "gtest/gtest.h"
#include "spdlog/spdlog.h"

#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

constexpr int kFlipsEach = 2000;

// Damages a bit of each frame after the sender has digested it: on the wire, or in the ring.
class DamagedOnTheWay : public CardStore {
 public:
  using CardStore::CardStore;
  void GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const override {
    CardStore::GatherRun(run, to, digests);
    const uint64_t bit = random_() % (8 * run.Bytes(shape().layout));
    to[bit / 8] ^= std::byte{1} << (bit % 8);
    ++flips;
  }
  mutable std::atomic<int> flips{0};

 private:
  mutable std::mt19937_64 random_{31};  // one thread at a time gathers
};

// Damages a bit of the receiver's pool after the bytes have arrived, before it looks at them.
class DamagedInThePool : public HostStore {
 public:
  using HostStore::HostStore;
  void Digest(const BlockRun& run, std::span<uint64_t> digests) const override {
    const int layer = run.layer_begin + Draw(run.layer_count);
    const int32_t block =
        run.source_blocks[static_cast<size_t>(Draw(static_cast<int>(run.source_blocks.size())))];
    const PageKind kind = Draw(2) == 0 ? PageKind::kKey : PageKind::kValue;
    const int head = run.heads.begin + Draw(run.heads.count);
    const int bit = Draw(static_cast<int>(8 * shape().layout.PageBytes()));
    HostAddress(shape().PageOffset(layer, block, kind, head))[bit / 8] ^= std::byte{1} << (bit % 8);
    ++flips;
    HostStore::Digest(run, digests);
  }
  mutable std::atomic<int> flips{0};

 private:
  int Draw(int below) const { return static_cast<int>(random_() % static_cast<uint64_t>(below)); }
  mutable std::mt19937_64 random_{37};  // a transfer's frames are digested under its lock
};

class Damage : public ::testing::TestWithParam<std::string> {
 protected:
  // Each refused transfer is warned of.
  void SetUp() override { spdlog::set_level(spdlog::level::err); }
  void TearDown() override { spdlog::set_level(spdlog::level::info); }

  static void ExpectNothingSealed(Ends* ends) {
    ends->Start();
    std::mt19937_64 random(41);
    for (int round = 0; round < kFlipsEach; ++round) {
      const TransferId id = TransferId::Random();
      std::vector<int32_t> from, to;
      for (uint64_t i = 0; i <= random() % 3; ++i) {
        from.push_back(static_cast<int32_t>(random() % 32));
        to.push_back(static_cast<int32_t>(4 * i + random() % 4));
      }
      ASSERT_OK(ends->sender->Open(ends->Expect(id, 1, to)));
      ends->PushAll(id, 1, from);
      ends->sender->Finish(id, 1);
      const Record::Receiver got = ends->record.AwaitQuiet(id, 1);
      ASSERT_EQ(got.sealed, 0) << "round " << round;
      ASSERT_EQ(got.status.code(), absl::StatusCode::kDataLoss) << got.status;
      ASSERT_EQ(ends->record.AwaitDone(id, 1).status.code(), absl::StatusCode::kDataLoss);
    }
    EXPECT_EQ(ends->receiver->Counters().failed(KvFailure::kDigestMismatch),
              static_cast<uint64_t>(kFlipsEach));
  }
};

TEST_P(Damage, InThePoolIsNeverSealed) {
  Ends ends(GetParam());
  const DamagedInThePool store(ends.target.region());
  ends.receiver_options.store = &store;
  ExpectNothingSealed(&ends);
  EXPECT_GE(store.flips, kFlipsEach);
}

// Between pools that are staged: elsewhere nothing lies between two pools of this process.
class DamageOnTheWay : public Damage {};

TEST_P(DamageOnTheWay, IsNeverSealed) {
  Ends ends(GetParam());
  const DamagedOnTheWay store(ends.source.region());
  ends.sender_options.store = &store;
  ExpectNothingSealed(&ends);
  EXPECT_GE(store.flips, kFlipsEach);
}

INSTANTIATE_TEST_SUITE_P(Transports, Damage, ::testing::Values("tcp", "shm", "shm_ring"));
INSTANTIATE_TEST_SUITE_P(Transports, DamageOnTheWay,
                         ::testing::Values("staged", "cards_ring", "nccl"));

}  // namespace
}  // namespace tandem::kvtransfer
