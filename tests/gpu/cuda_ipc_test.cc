// The cuda_ipc transport on one card: equality, faults, and what it reaches beside a plain copy.
#include <chrono>
#include <csignal>
#include <cstdio>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kvtransfer/store/kv_store.h"
#include "kvtransfer/transport/kv_transport.h"
#include "kvtransfer/transport/shm_control.h"
#include "tests/gpu/card_ends.h"

namespace tandem::kvtransfer {
namespace {

using ::testing::HasSubstr;

class CudaIpc : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HaveCard()) GTEST_SKIP() << "no CUDA card here";
  }
};

TEST_F(CudaIpc, BlocksOfEveryLayoutArrive) {
  std::mt19937_64 random(4);
  for (int number = 0; number < kNumIpcLayouts; ++number) {
    const KvLayout layout = IpcLayout(number);
    // Of small blocks also more than a launch takes.
    const int blocks = layout.BlockBytes() > (64 << 10) ? 50 : 600;
    CardEnds card(layout, blocks, blocks + 10);
    card.ends.Start();
    for (const size_t count : {blocks - 9, 1, 37}) {
      const TransferId id = TransferId::Random();
      const auto from = RandomBlocks(&random, blocks, count);
      const auto to = RandomBlocks(&random, blocks + 10, count);
      ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, 1, to)));
      card.ends.PushAll(id, 1, from);
      card.ends.sender->Finish(id, 1);
      const Record::Receiver got = card.ends.record.AwaitQuiet(id, 1);
      ASSERT_EQ(got.sealed, 1) << got.status << " layout " << number;
      EXPECT_EQ(got.stats.transport, "cuda_ipc");
      EXPECT_OK(card.ends.record.AwaitDone(id, 1).status);
      card.target.CopyTo(&card.ends.target);
      card.ends.ExpectEqualBlocks(from, to);
    }
  }
}

TEST_F(CudaIpc, AnotherProcessWritesThePool) {
  CardEnds card(IpcLayout(0), 64, 128);
  card.ends.StartReceiver();
  Writer writer(0, 64, "auto");
  for (int round = 0; round < 4; ++round) {
    card.target.Fill(std::byte{0xee});
    const TransferId id = TransferId::Random();
    writer.Ship(card.ends.Expect(id, 1, Range(round * 5, 40)), 3 + round);
    const Writer::Result sent = writer.Await();
    EXPECT_EQ(sent.transport, "cuda_ipc");
    EXPECT_EQ(sent.code, 0);
    EXPECT_EQ(card.ends.record.AwaitQuiet(id, 1).sealed, 1);
    card.target.CopyTo(&card.ends.target);
    card.ends.ExpectEqualBlocks(Range(3 + round, 40), Range(round * 5, 40));  // the same seed
    EXPECT_TRUE(card.Holds(60, 60, std::byte{0xee})) << "other blocks were written";
  }
}

TEST_F(CudaIpc, AProcessThatDoesNotSeeTheCardFallsBackOrIsRefused) {
  CardEnds card(IpcLayout(1), 16, 16);
  Ends host("auto", IpcLayout(1), 16, 16);
  const auto card_store = *MakeKvStore(card.source.region());
  EXPECT_THAT(card_store->CanWrite("GPU-of-another-host").ToString(),
              HasSubstr("does not see the peer's card GPU-of-another-host"));
  const auto host_store = *MakeKvStore(host.source.region());
  EXPECT_THAT(CudaIpcTransport()->Register(host_store.get(), {}).status().ToString(),
              HasSubstr("cuda_ipc needs a KV pool in a card's memory"));
}

TEST_F(CudaIpc, AWrongTokenOrLayoutIsRefusedBeforeAByteMoves) {
  CardEnds card(IpcLayout(0), 16, 16);
  card.ends.Start();
  const TransferId id = TransferId::Random();
  KvSendTarget target = card.ends.Expect(id, 1, Range(0, 8));
  target.token[3] ^= 1;
  ASSERT_OK(card.ends.sender->Open(target));
  card.ends.PushAll(id, 1, Range(0, 8));
  card.ends.sender->Finish(id, 1);
  EXPECT_FALSE(card.ends.record.AwaitDone(id, 1).status.ok());
  Writer other(4, 16, "auto");  // another layout
  const TransferId second = TransferId::Random();
  other.Ship(card.ends.Expect(second, 1, Range(8, 4)), 0);
  EXPECT_NE(other.Await().code, 0);
  EXPECT_TRUE(card.Holds(0, 16, std::byte{0xee}));
}

// Whenever a transfer is cancelled: once it is quiet, nothing of it lands any more.
TEST_F(CudaIpc, NothingLandsAfterQuiet) {
  CardEnds card(IpcLayout(0), 128, 128);
  card.ends.Start();
  std::mt19937_64 random(9);
  int cancelled = 0;
  for (uint64_t round = 1; round <= 60; ++round) {
    card.target.Fill(std::byte{0xee});
    const TransferId id = TransferId::Random();
    ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, round, Range(0, 128))));
    card.ends.PushAll(id, round, Range(0, 128));
    card.ends.sender->Finish(id, round);
    absl::SleepFor(absl::Microseconds(random() % 600));
    if (round % 2 == 0) {
      card.ends.receiver->Cancel(id, round);
    } else {
      card.ends.sender->Abort(id, round);
    }
    card.ends.record.AwaitDone(id, round);
    card.ends.receiver->Cancel(id, round);  // also where the sender was never admitted
    const Record::Receiver got = card.ends.record.AwaitQuiet(id, round);
    cancelled += got.sealed == 0 ? 1 : 0;
    card.target.Fill(std::byte{0x5a});
    ASSERT_TRUE(card.Holds(0, 128, std::byte{0x5a})) << "a late byte landed";
  }
  std::printf("%d of 60 were cut short\n", cancelled);
  EXPECT_GT(cancelled, 5);
}

TEST_F(CudaIpc, AbortedTransfersLeaveNothingBehind) {
  CardEnds card(IpcLayout(0), 64, 64);
  card.ends.Start();
  // Whole, so that the driver has every kernel in the card's memory before it is weighed.
  card.ends.record.AwaitQuiet(card.ends.ShipOne(), 1);
  size_t before = 0, after = 0, total = 0;
  for (uint64_t round = 1; round <= 1000; ++round) {
    const TransferId id = TransferId::Random();
    ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, 1, Range(0, 32))));
    card.ends.PushAll(id, 1, Range(0, 32));
    if (round % 3 != 0) absl::SleepFor(absl::Microseconds(round % 97));
    card.ends.sender->Abort(id, 1);
    card.ends.record.AwaitDone(id, 1);
    if (round % 2 == 0) card.ends.receiver->Cancel(id, 1);
    card.ends.receiver->Cancel(id, 1);
    card.ends.record.AwaitQuiet(id, 1);
    if (round == 20) {
      ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
    }
  }
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  // The driver takes memory for itself in pieces of 2 MiB; a page per transfer would be twice that.
  EXPECT_LE(before, after + (size_t{2} << 20));
  const TransferId id = card.ends.ShipOne();
  EXPECT_EQ(card.ends.record.AwaitQuiet(id, 1).sealed, 1);
}

// The fence. With KvReader::WriterGone() always true this says "quiet while ...".
TEST_F(CudaIpc, AStoppedWriterKeepsItsBlocksAndNothingLateLands) {
  CardEnds card(IpcLayout(0), 64, 64);
  card.ends.StartReceiver();
  Writer writer(0, 64, "auto");
  const TransferId id = TransferId::Random();
  writer.Ship(card.ends.Expect(id, 1, Range(0, 40)), 0, /*pause_us=*/20'000);
  const absl::Time end = absl::Now() + kPatience;
  while (card.ends.receiver->BytesArrived(id, 1) == 0 && absl::Now() < end) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  writer.Stop();
  card.ends.receiver->Cancel(id, 1);
  while (card.ends.receiver->Counters().fenced_transfers == 0 &&
         card.ends.record.Received(id, 1).quiet == 0 && absl::Now() < end) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  absl::SleepFor(absl::Seconds(1));
  EXPECT_EQ(card.ends.record.Received(id, 1).quiet, 0) << "quiet while the writer may still write";
  EXPECT_FALSE(card.ends.receiver->Expect(id, 2, Range(0, 40), "").ok());
  writer.Signal(SIGCONT);
  card.ends.record.AwaitQuiet(id, 1);
  card.target.Fill(std::byte{0x5a});
  EXPECT_NE(writer.Await().code, 0);
  EXPECT_TRUE(card.Holds(0, 64, std::byte{0x5a})) << "a late byte landed";
  // It goes on, and so may its blocks.
  const TransferId next = TransferId::Random();
  writer.Ship(card.ends.Expect(next, 1, Range(0, 40)), 0);
  EXPECT_EQ(writer.Await().code, 0);
}

TEST_F(CudaIpc, AKilledWriterIsQuietOnceItsProcessIsGone) {
  CardEnds card(IpcLayout(0), 256, 256);
  card.ends.StartReceiver();
  std::mt19937_64 random(3);
  for (uint64_t round = 1; round <= 3; ++round) {
    Writer writer(0, 256, "auto");
    const TransferId warm = TransferId::Random();
    writer.Ship(card.ends.Expect(warm, round, Range(0, 8)), 0);
    EXPECT_EQ(writer.Await().code, 0);
    const TransferId id = TransferId::Random();
    writer.Ship(card.ends.Expect(id, round, Range(0, 256)), 0);
    absl::SleepFor(absl::Microseconds(200 + random() % 1000));
    writer.Signal(SIGKILL);
    const absl::Time killed = absl::Now();
    const Record::Receiver got = card.ends.record.AwaitQuiet(id, round);
    std::printf("quiet %.0f ms after the kill, sealed %d\n",
                absl::ToDoubleMilliseconds(absl::Now() - killed), got.sealed);
    card.target.Fill(std::byte{0x5a});
    absl::SleepFor(absl::Milliseconds(50));
    EXPECT_TRUE(card.Holds(0, 256, std::byte{0x5a})) << "a late byte landed";
  }
}

TEST_F(CudaIpc, AReceiverThatEndsFailsTheTransfersAndFreesItsMemory) {
  CardEnds card(IpcLayout(0), 64, 64);
  card.ends.Start();
  const TransferId id = card.ends.ShipOne();
  EXPECT_EQ(card.ends.record.AwaitQuiet(id, 1).sealed, 1);
  const TransferId cut = TransferId::Random();
  ASSERT_OK(card.ends.sender->Open(card.ends.Expect(cut, 1, Range(0, 8))));
  card.ends.receiver = nullptr;
  EXPECT_EQ(card.ends.record.AwaitDone(cut, 1).status.code(), absl::StatusCode::kUnavailable);
}

// The copy itself beside cudaMemcpy of the same bytes, from device memory to device memory.
TEST_F(CudaIpc, SaysWhatTheCopyReaches) {
  constexpr int kBlocks = 512;
  const KvLayout layout = IpcLayout(0);
  TestPool host(layout, kBlocks);
  host.FillRandom(3);
  const CardPool source(host), target(host);
  const auto store = *MakeKvStore(source.region());
  const auto control = *ShmControl::Create();
  auto page = *SharedMapping::Map(control->fd(), kShmControlBytes);
  const ShmGrant grant = *control->Grant();
  const auto* slot = &reinterpret_cast<ShmControlPage*>(page.data())->grants[grant.slot];
  const auto peer = *store->MapPeer(target.region().fd, store->shape(), {page.data(), page.size()});
  std::mt19937_64 random(1);
  const auto from = RandomBlocks(&random, kBlocks, kBlocks);
  const auto to = RandomBlocks(&random, kBlocks, kBlocks);
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  struct Shape {
    int layers;
    size_t blocks;
    int launches;
  };
  for (const Shape shape : {Shape{28, 1, 1}, {1, 256, 1}, {4, 256, 1}, {7, 256, 4}, {7, 440, 4}}) {
    std::vector<double> plain, copied;
    double bytes = 0;
    for (int round = 0; round < 25; ++round) {
      const size_t first = static_cast<size_t>(round) * 37 % (kBlocks - shape.blocks + 1);
      const std::span sources = std::span(from).subspan(first, shape.blocks);
      const std::span targets = std::span(to).subspan(first, shape.blocks);
      const size_t run_bytes =
          shape.blocks * static_cast<size_t>(shape.layers) * layout.BlockLayerBytes();
      bytes = static_cast<double>(run_bytes) * shape.launches;
      auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < shape.launches; ++i) {
        const size_t offset = static_cast<size_t>(i) * run_bytes;
        ASSERT_EQ(cudaMemcpyAsync(target.region().base + offset, source.region().base + offset,
                                  run_bytes, cudaMemcpyDeviceToDevice, stream),
                  cudaSuccess);
      }
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      const auto middle = std::chrono::steady_clock::now();
      std::vector<std::unique_ptr<PeerPool::Copy>> copies;
      for (int i = 0; i < shape.launches; ++i) {
        const int layer = i * shape.layers % (28 - shape.layers + 1);
        copies.push_back(
            peer->Start({layer, shape.layers, {0, 4}, sources, targets}, slot, grant.generation));
      }
      for (auto& copy : copies) ASSERT_TRUE(copy->Wait());
      const auto end = std::chrono::steady_clock::now();
      plain.push_back(std::chrono::duration<double>(middle - begin).count());
      copied.push_back(std::chrono::duration<double>(end - middle).count());
    }
    std::printf(
        "%6.1f MB in %d: copy and digest %6.1f us (%5.0f GB/s), cudaMemcpy %6.1f us (%5.0f "
        "GB/s), ratio %.2f\n",
        bytes / 1e6, shape.launches, Median(copied) * 1e6, bytes / Median(copied) / 1e9,
        Median(plain) * 1e6, bytes / Median(plain) / 1e9, Median(plain) / Median(copied));
    Figure("cuda_ipc_copy_of_memcpy", bytes, Median(plain) / Median(copied));
  }
  // A grant that is gone.
  control->Revoke(grant);
  EXPECT_FALSE(peer->Start({0, 28, {0, 4}, from, to}, slot, grant.generation)->Wait());
  cudaStreamDestroy(stream);
}

// From the first word between the two to the seal, in one process, whose ends share the card, and
// between two, which take turns on it unless there is MPS.
TEST_F(CudaIpc, SaysWhatATransferTakes) {
  for (const std::string transport : {"cuda_ipc", "tcp"}) {
    CardEnds card(IpcLayout(0), 256, 256, transport);
    card.ends.Start();
    Writer writer(0, 256, transport);
    for (const int count : {1, 32, 256}) {
      std::vector<double> one, two;
      for (int round = 0; round < (count > 100 ? 12 : 30); ++round) {
        const TransferId id = TransferId::Random();
        ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, 1, Range(0, count))));
        const auto begin = std::chrono::steady_clock::now();
        card.ends.PushAll(id, 1, Range(0, count));
        card.ends.sender->Finish(id, 1);
        EXPECT_OK(card.ends.record.AwaitDone(id, 1).status);
        one.push_back(
            std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
                .count());
        const TransferId second = TransferId::Random();
        writer.Ship(card.ends.Expect(second, 1, Range(0, count)), 0);
        const Writer::Result sent = writer.Await();
        ASSERT_EQ(sent.code, 0);
        EXPECT_EQ(sent.transport, transport);
        two.push_back(sent.microseconds);
      }
      const double bytes = count * static_cast<double>(IpcLayout(0).BlockBytes());
      std::printf(
          "%s, %3d blocks, %6.1f MB: one process %8.0f us (%6.1f GB/s), two %8.0f us (%6.1f "
          "GB/s)\n",
          transport.c_str(), count, bytes / 1e6, Median(one), bytes / Median(one) / 1e3,
          Median(two), bytes / Median(two) / 1e3);
      if (count == 1) {
        Figure(transport + "_1_block_us", Median(one));
        Figure(transport + "_two_processes_1_block_us", Median(two));
      } else {
        Figure(transport + "_GBps", bytes, bytes / Median(one) / 1e3);
        Figure(transport + "_two_processes_GBps", bytes, bytes / Median(two) / 1e3);
      }
    }
  }
}

}  // namespace
}  // namespace tandem::kvtransfer
