// The shm transport in one process: grants, revocation, and when it is not the one that is used.
#include <atomic>
#include <functional>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kvtransfer/store/host_store.h"
#include "kvtransfer/transport/shm_control.h"
#include "kvtransfer/transport/unix_rendezvous.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

// Calls `before` ahead of every copy of a block, with the number of the copy.
class HookedStore : public HostStore {
 public:
  HookedStore(const KvRegion& region, std::function<void(int)> before)
      : HostStore(region), before_(std::move(before)) {}
  bool CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to, CopyMode mode,
               std::span<uint64_t> digests, absl::FunctionRef<bool()> go_on) const override {
    for (int l = 0; l < run.layer_count; ++l) {
      for (size_t i = 0; i < run.source_blocks.size(); ++i) {
        if (!go_on()) return false;
        before_(copies_++);
        const BlockRun one = {run.layer_begin + l, 1, run.heads, run.source_blocks.subspan(i, 1),
                              run.target_blocks.subspan(i, 1)};
        HostStore::CopyRun(one, target, to, mode, digests.subspan(i, 1), [] { return true; });
        if (after_) after_(one, target, to);
      }
    }
    return true;
  }
  // Called behind every copy of a block, to damage it for instance.
  std::function<void(const BlockRun&, const KvPoolShape&, std::byte*)> after_;
  int copies() const { return copies_; }

 private:
  const std::function<void(int)> before_;
  mutable std::atomic<int> copies_{0};
};

TEST(ShmControl, AGrantHoldsUntilItIsRevokedAndIsNeverGivenTwice) {
  const auto control = *ShmControl::Create();
  const auto mapping = *SharedMapping::Map(control->fd(), kShmControlBytes);
  const auto* page = reinterpret_cast<const ShmControlPage*>(mapping.data());
  const ShmGrant first = *control->Grant();
  ShmGrant decoded;
  ASSERT_TRUE(ShmGrant::Decode(first.Encode(), &decoded));
  EXPECT_EQ(page->grants[decoded.slot].load(), decoded.generation);
  control->Revoke(first);
  EXPECT_NE(page->grants[first.slot].load(), first.generation);
  control->Release(first);
  const ShmGrant second = *control->Grant();
  EXPECT_EQ(second.slot, first.slot);
  EXPECT_NE(second.generation, first.generation);
}

TEST(ShmControl, TransfersOfOneWriterAreBounded) {
  const auto control = *ShmControl::Create();
  for (size_t i = 0; i < ShmControlPage::kSlots; ++i) ASSERT_OK(control->Grant());
  EXPECT_EQ(control->Grant().status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(ShmControl, MalformedGrantsAreRefused) {
  ShmGrant grant;
  EXPECT_FALSE(ShmGrant::Decode("", &grant));
  EXPECT_FALSE(ShmGrant::Decode(ShmGrant{ShmControlPage::kSlots, 1}.Encode(), &grant));
  EXPECT_FALSE(ShmGrant::Decode(ShmGrant{1, 0}.Encode(), &grant));
}

TEST(SharedMapping, AFileThatIsTooSmallIsNotMapped) {
  TestPool pool(SmallLayout(), 1);
  EXPECT_EQ(SharedMapping::Map(pool.region().fd, pool.region().TotalBytes() + 1).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(Shm, ARevokedWriterStopsBeforeTheNextPiece) {
  Ends ends("shm");
  const TransferId id = TransferId::Random();
  const HookedStore store(ends.source.region(), [&](int copy) {
    if (copy == 1) ends.receiver->Cancel(id, 1);
  });
  ends.sender_options.store = &store;
  ends.Start();
  ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {9, 3, 5})));
  ends.PushAll(id, 1, {1, 6, 11});
  ends.sender->Finish(id, 1);
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kCancelled);
  const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(got.sealed + got.failed, 0);
  EXPECT_EQ(store.copies(), 2) << "the copy under way, and none after it";
  EXPECT_EQ(ends.receiver->Counters().fenced_transfers, 0);
}

TEST(Shm, NothingIsWrittenBeforeOpenIsAnswered) {
  Ends ends("shm");
  const HookedStore store(ends.source.region(), [](int) {});
  ends.sender_options.store = &store;
  ends.Start();
  const TransferId id = TransferId::Random();
  const KvSendTarget target = ends.Expect(id, 1, {9});
  ends.receiver->Cancel(id, 1);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).quiet, 1);  // at once: nobody was admitted
  ASSERT_OK(ends.sender->Open(target));
  ends.PushAll(id, 1, {1});
  ends.sender->Finish(id, 1);
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(store.copies(), 0);
}

TEST(Shm, DamageInThePoolIsNeverSealed) {
  Ends ends("shm");
  std::atomic<int> damaged{0};
  HookedStore store(ends.source.region(), [](int) {});
  store.after_ = [&](const BlockRun& run, const KvPoolShape& target, std::byte* to) {
    if (run.layer_begin != 2) return;
    to[target.BlockOffset(2, run.target_blocks[0]) + 7] ^= std::byte{4};
    ++damaged;
  };
  ends.sender_options.store = &store;
  ends.Start();
  const TransferId id = ends.ShipOne();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(damaged, 1);
  EXPECT_EQ(ends.receiver->Counters().failed(KvFailure::kDigestMismatch), 1);
}

TEST(Shm, APoolThatIsNotSharedIsShippedThroughTheRing) {
  Ends ends("auto");
  ends.receiver_options.region.fd = -1;
  ends.Start();
  const TransferId id = ends.ShipOne();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).stats.transport, "shm_ring");
}

TEST(Shm, TheReceiverMayInsist) {
  Ends ends("auto");
  ends.receiver_options.transports = "tcp";
  ends.Start();
  const TransferId id = ends.ShipOne();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).stats.transport, "tcp");
  EXPECT_EQ(ends.sender->Counters().transport_fallbacks, 0) << "as configured, not a fallback";
}

TEST(Shm, IsTheDefaultOfOneHost) {
  Ends ends("auto");
  ends.Start();
  const TransferId id = ends.ShipOne();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).stats.transport, "shm");
}

TEST(Shm, OptionsNameWhatIsUnknown) {
  Ends ends("shm,pigeon");
  EXPECT_THAT(
      KvSender::Start(ends.sender_options).status().ToString(),
      HasSubstr(
          "kv-transport must be auto or some of cuda_ipc, shm, shm_ring, nccl, tcp, got pigeon"));
  ends.receiver_options.transports = "tcp,tcp";
  EXPECT_THAT(KvReceiver::Start(ends.receiver_options).status().ToString(),
              HasSubstr("names tcp twice"));
}

TEST(Rendezvous, NobodyIsFoundUnderAWrongName) {
  EXPECT_EQ(ConnectToPeer("tandem-kv-nobody").status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace tandem::kvtransfer
