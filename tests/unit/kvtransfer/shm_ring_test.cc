// The shm_ring transport without a card: its slots, and what a late, slow, lost or damaged end
// does. Between processes: shm_process_test.cc. On cards: tests/gpu/shm_ring_test.cc.
#include "kvtransfer/transport/shm_ring.h"

#include <atomic>
#include <filesystem>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kvtransfer/transport/faulty_network.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;
using Use = RingReaderSlots::Use;

constexpr size_t kSlot = 8192;

RingMemory MakeRing(size_t slots) {
  return *RingMemory::Create(kRingPageBytes + slots * kSlot, kSlot, /*node=*/-1);
}

TEST(RingSlots, AreTakenOnceUntilTheyAreReleased) {
  const RingMemory ring = MakeRing(3);
  RingWriterSlots writer(ring);
  RingReaderSlots reader(ring);
  std::vector<RingPlace> places;
  for (int i = 0; i < 3; ++i) places.push_back(*writer.TryTake());
  EXPECT_EQ(writer.TryTake(), std::nullopt);
  for (const RingPlace& place : places) EXPECT_EQ(*reader.Take(place, kSlot), Use::kNew);
  reader.Release(places[1]);
  const RingPlace again = *writer.TryTake();
  EXPECT_EQ(again.slot, places[1].slot);
  EXPECT_EQ(again.use, places[1].use + 1);
  EXPECT_EQ(writer.TryTake(), std::nullopt);
  EXPECT_EQ(*reader.Take(RingPlace::Decode(again.Encode()), 1), Use::kNew);
}

TEST(RingSlots, ARepeatedFrameIsKnown) {
  const RingMemory ring = MakeRing(2);
  RingWriterSlots writer(ring);
  RingReaderSlots reader(ring);
  const RingPlace first = *writer.TryTake();
  EXPECT_EQ(*reader.Take(first, 1), Use::kNew);
  EXPECT_EQ(*reader.Take(first, 1), Use::kRepeated);
  reader.Release(first);
  EXPECT_EQ(*reader.Take(first, 1), Use::kRepeated);
}

TEST(RingSlots, ADishonestWriterIsRefused) {
  const RingMemory ring = MakeRing(2);
  RingReaderSlots reader(ring);
  EXPECT_THAT(reader.Take({2, 1}, 1).status().ToString(), HasSubstr("slot 2 (use 1) of 2 slots"));
  EXPECT_FALSE(reader.Take({0, 0}, 1).ok());
  EXPECT_FALSE(reader.Take({0, 1}, kSlot + 1).ok());
  EXPECT_FALSE(reader.Take({0, 2}, 1).ok()) << "a use was left out";
  EXPECT_TRUE(reader.Take({0, 1}, 1).ok());
  // The page is the writer's to write, but not to be believed.
  ring.page()->released[0] = 1;
  EXPECT_THAT(reader.Take({0, 2}, 1).status().ToString(), HasSubstr("time 1 is not over"));
}

TEST(RingMemory, ARingWithoutRoomForTwoFramesIsRefusedByName) {
  EXPECT_THAT(RingMemory::Create(kRingPageBytes + 2 * kSlot - 1, kSlot, -1).status().ToString(),
              HasSubstr("--kv-ring-bytes must be at least 20480"));
  Ends ends("shm_ring");
  ends.receiver_options.ring_bytes = size_t{1} << 20;
  EXPECT_THAT(KvReceiver::Start(ends.receiver_options).status().ToString(),
              HasSubstr("--kv-ring-bytes must be at least 16781312"));
}

TEST(RingMemory, WhatAnotherProcessHasMadeIsChecked) {
  const RingMemory made = MakeRing(4);
  const auto join = [&] { return RingMemory::Join(Fd(dup(made.fd())), made.bytes()).status(); };
  EXPECT_OK(join());
  made.page()->num_slots = 5;
  EXPECT_FALSE(join().ok());
  made.page()->num_slots = 4;
  made.page()->version = 99;
  EXPECT_THAT(join().ToString(), HasSubstr("version 99"));
  made.page()->version = RingPage::kVersion;
  made.page()->slot_bytes = ~uint64_t{0};
  EXPECT_FALSE(join().ok());
}

// A ring of two slots of 4 MiB, and pools of blocks of which some fill a slot.
constexpr KvLayout kLarge = {2, 16, 128, 256, DType::kBFloat16};  // 2 MiB a block of a layer

struct RingEnds : Ends {
  explicit RingEnds(int blocks = 16) : Ends("shm_ring", kLarge, blocks, blocks) {
    receiver_options.ring_bytes = kRingPageBytes + 2 * (size_t{8} << 20);
    // However slow the machine: frames land behind FINISH here.
    receiver_options.incomplete_timeout = kPatience;
    receiver_options.quiet_timeout = kPatience;
  }
  TransferId Ship(int count, int first = 0) {
    const TransferId id = TransferId::Random();
    std::vector<int32_t> blocks(static_cast<size_t>(count));
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = first + static_cast<int32_t>(i);
    EXPECT_OK(sender->Open(Expect(id, 1, blocks)));
    PushAll(id, 1, blocks);
    sender->Finish(id, 1);
    return id;
  }
};

TEST(ShmRing, ATransferLargerThanTheRingGetsThrough) {
  RingEnds ends;
  ends.Start();
  const TransferId id = ends.Ship(16);
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
  ends.ExpectEqualBlocks({0, 7, 15}, {0, 7, 15});
}

// A store whose card takes its time: what is fetched out of the ring arrives when it is let.
class HeldStore : public HostStore {
 public:
  using HostStore::HostStore;
  absl::StatusOr<std::unique_ptr<HostWindow>> OpenWindow(std::span<std::byte> window,
                                                         size_t max_bytes) const override {
    absl::StatusOr<std::unique_ptr<HostWindow>> plain = HostStore::OpenWindow(window, max_bytes);
    if (!plain.ok()) return plain.status();
    return std::make_unique<Window>(this, *std::move(plain));
  }
  // `frames` of them: each in a thread.
  void AwaitHeld(int frames = 1) const {
    absl::MutexLock lock(&mutex_);
    const auto held = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return held_ >= frames; };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&held), kPatience));
  }
  void LetGo() const {
    absl::MutexLock lock(&mutex_);
    go_ = true;
  }

 private:
  class Window : public HostWindow {
   public:
    Window(const HeldStore* store, std::unique_ptr<HostWindow> plain)
        : store_(store), plain_(std::move(plain)) {}
    std::unique_ptr<Gathering> Gather(const BlockRun& run, size_t at) override {
      return plain_->Gather(run, at);
    }
    std::unique_ptr<Fetched> Fetch(size_t at, size_t bytes) override {
      return std::make_unique<Held>(store_, plain_->Fetch(at, bytes));
    }
    void ProbeOut(size_t at, size_t bytes, std::span<const std::byte> pattern) override {
      plain_->ProbeOut(at, bytes, pattern);
    }
    std::vector<std::byte> ProbeIn(size_t at, size_t bytes, bool wanted) override {
      return plain_->ProbeIn(at, bytes, wanted);
    }

   private:
    const HeldStore* const store_;
    const std::unique_ptr<HostWindow> plain_;
  };
  class Held : public Fetched {
   public:
    Held(const HeldStore* store, std::unique_ptr<Fetched> plain)
        : store_(store), plain_(std::move(plain)) {}
    absl::Status Wait() override {
      absl::Status came = plain_->Wait();
      absl::MutexLock lock(&store_->mutex_);
      ++store_->held_;
      store_->mutex_.Await(absl::Condition(&store_->go_));
      return came;
    }
    void Scatter(std::span<const CopyPiece> pieces) override { plain_->Scatter(pieces); }

   private:
    const HeldStore* const store_;
    const std::unique_ptr<Fetched> plain_;
  };
  mutable absl::Mutex mutex_;
  mutable int held_ ABSL_GUARDED_BY(mutex_) = 0;
  mutable bool go_ ABSL_GUARDED_BY(mutex_) = false;
};

// The fence. With Reception::WriteGuarded() always writing this says "a late byte landed".
TEST(ShmRing, FramesThatAreOnTheirWayWhenATransferIsCancelledNeverLand) {
  RingEnds ends;
  const HeldStore store(ends.target.region());
  ends.receiver_options.store = &store;
  ends.Start();
  const TransferId id = ends.Ship(4);  // frames that a thread brings in
  store.AwaitHeld();
  ends.receiver->Cancel(id, 1);
  // The sender says QUIET, which is read while the frames are held.
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kCancelled);
  ends.record.AwaitQuiet(id, 1);
  ends.target.Fill(std::byte{0x5a});  // the blocks are somebody else's
  store.LetGo();
  const TransferId next = ends.Ship(2, /*first=*/8);  // behind them
  EXPECT_EQ(ends.record.AwaitQuiet(next, 1).sealed, 1);
  ends.ExpectEqualBlocks({8, 9}, {8, 9});
  for (const int block : {0, 1, 2, 3}) {
    EXPECT_EQ(ends.target.BlockBytes(block), std::string(kLarge.BlockBytes(), '\x5a'))
        << "a late byte landed";
  }
}

// Its header comes again while its bytes are on their way into the pool.
TEST(ShmRing, ARepeatedFrameIsNotThereBeforeItsBytes) {
  std::atomic<bool> repeated = false;
  const auto network = MakeFaultyNetwork(TcpNetwork(), [&](const FrameHeader& header, uint64_t) {
    const bool first = header.type == FrameType::kData && !repeated.exchange(true);
    return first ? Fault::kDuplicate : Fault::kNone;
  });
  RingEnds ends;
  const HeldStore store(ends.target.region());
  ends.receiver_options.store = &store;
  ends.sender_options.network = network.get();
  ends.Start();
  const TransferId id = ends.Ship(4);  // two frames that threads bring in
  store.AwaitHeld(2);                  // and what lay between them was taken
  EXPECT_EQ(ends.receiver->BytesArrived(id, 1), 0u);
  store.LetGo();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
  ends.ExpectEqualBlocks({0, 1, 2, 3}, {0, 1, 2, 3});
  ends.sender.reset();  // before its network
}

// A receiver that takes nothing holds up no abort: what has no slot yet is not read any more.
TEST(ShmRing, AnAbortDoesNotWaitForTheReceiver) {
  RingEnds ends;
  const HeldStore store(ends.target.region());
  ends.receiver_options.store = &store;
  ends.Start();
  const TransferId id = ends.Ship(16);
  store.AwaitHeld();
  ends.sender->Abort(id, 1);
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kCancelled);
  store.LetGo();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 0);
  const TransferId next = ends.Ship(16);
  EXPECT_EQ(ends.record.AwaitQuiet(next, 1).sealed, 1);
}

TEST(ShmRing, AReceiverThatTakesNothingIsGivenUp) {
  RingEnds ends;
  const HeldStore store(ends.target.region());
  ends.receiver_options.store = &store;
  ends.sender_options.io_timeout = absl::Milliseconds(300);
  ends.Start();
  const TransferId id = ends.Ship(16);
  EXPECT_EQ(ends.record.AwaitDone(id, 1).status.code(), absl::StatusCode::kUnavailable);
  store.LetGo();
  EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 0);
}

int OpenDescriptors() {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    count += entry.exists() ? 1 : 0;
  }
  return count;
}

TEST(ShmRing, AThousandAbortedTransfersLeaveNoSlotAndNoDescriptor) {
  Ends ends("shm_ring");
  ends.Start();
  ends.record.AwaitQuiet(ends.ShipOne(), 1);
  const int before = OpenDescriptors();
  std::mt19937_64 random(5);
  for (uint64_t round = 0; round < 1000; ++round) {
    const TransferId id = TransferId::Random();
    ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, {1, 2, 3})));
    ends.PushAll(id, 1, {4, 5, 6});
    if (round % 3 != 0) absl::SleepFor(absl::Microseconds(random() % 100));
    ends.sender->Abort(id, 1);
    ends.record.AwaitDone(id, 1);
    ends.receiver->Cancel(id, 1);
    ends.record.AwaitQuiet(id, 1);
  }
  EXPECT_EQ(OpenDescriptors(), before);
  // A slot that was lost each time would have stopped everything long ago; so would the last.
  for (int i = 0; i < 20; ++i) EXPECT_EQ(ends.record.AwaitQuiet(ends.ShipOne(), 1).sealed, 1);
}

}  // namespace
}  // namespace tandem::kvtransfer
