// The nccl transport between two processes: on two cards where there are two, else on one card, as
// processes of different hosts, whose bytes then go over sockets. Equality, faults, and between two
// cards what it reaches beside plain sends of the same bytes.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <nccl.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/cuda/cuda_library.h"
#include "kvtransfer/store/kv_store.h"
#include "tests/gpu/card_ends.h"

namespace tandem::kvtransfer {
namespace {

constexpr char kNccl[] = "nccl";

class NcclTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (NumCards() > 1) return;
    setenv("NCCL_HOSTID", "reader", 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 1);
  }
  void SetUp() override {
    if (!HaveCard()) GTEST_SKIP() << "no CUDA card here";
    const auto library = ::tandem::cuda::OpenCudaLibrary("libnccl.so.2");
    if (!library.ok()) GTEST_SKIP() << library.status();
  }
  // On the second card, or on the first as of another host.
  static Writer StartWriter(int layout, int blocks) {
    return Writer(layout, blocks, kNccl,
                  {NumCards() > 1 ? "CUDA_VISIBLE_DEVICES=1" : "NCCL_HOSTID=writer",
                   "NCCL_DEBUG_FILE=/dev/stderr"});  // its stdout is read here
  }
};

double SecondsOf(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

TEST_F(NcclTest, BlocksOfEveryLayoutArrive) {
  for (int number = 0; number < kNumIpcLayouts; ++number) {
    const KvLayout layout = IpcLayout(number);
    const int blocks = layout.BlockBytes() > (64 << 10) ? 50 : 600;
    CardEnds card(layout, blocks, blocks + 10, kNccl);
    card.ends.StartReceiver();
    Writer writer = StartWriter(number, blocks);
    for (const int count : {blocks - 9, 1, 37}) {
      card.target.Fill(std::byte{0xee});
      const TransferId id = TransferId::Random();
      writer.Ship(card.ends.Expect(id, 1, Range(5, count)), 3);
      const Writer::Result sent = writer.Await();
      ASSERT_EQ(sent.code, 0) << "layout " << number;
      EXPECT_EQ(sent.transport, kNccl);
      const Record::Receiver got = card.ends.record.AwaitQuiet(id, 1);
      ASSERT_EQ(got.sealed, 1) << got.status << " layout " << number;
      EXPECT_EQ(got.stats.transport, kNccl);
      card.target.CopyTo(&card.ends.target);
      card.ends.ExpectEqualBlocks(Range(3, count), Range(5, count));  // the same seed
      EXPECT_TRUE(card.Holds(0, 5, std::byte{0xee})) << "other blocks were written";
    }
  }
}

TEST_F(NcclTest, NothingLandsAfterQuiet) {
  CardEnds card(IpcLayout(0), 128, 128, kNccl);
  card.ends.StartReceiver();
  Writer writer = StartWriter(0, 128);
  std::mt19937_64 random(9);
  int cancelled = 0;
  size_t before = 0, after = 0, total = 0;
  for (uint64_t round = 1; round <= 60; ++round) {
    card.target.Fill(std::byte{0xee});
    const TransferId id = TransferId::Random();
    writer.Ship(card.ends.Expect(id, round, Range(0, 128)), 0, /*pause_us=*/20);
    absl::SleepFor(absl::Microseconds(random() % 4000));
    card.ends.receiver->Cancel(id, round);
    const Record::Receiver got = card.ends.record.AwaitQuiet(id, round);
    cancelled += got.sealed == 0 ? 1 : 0;
    card.target.Fill(std::byte{0x5a});
    ASSERT_TRUE(card.Holds(0, 128, std::byte{0x5a})) << "a late byte landed";
    (void)writer.Await();
    if (round == 20) {
      ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
    }
  }
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_EQ(before, after) << "memory of the card is left behind";
  std::printf("%d of 60 were cut short\n", cancelled);
  EXPECT_GT(cancelled, 5);
  const TransferId id = TransferId::Random();
  writer.Ship(card.ends.Expect(id, 1, Range(0, 128)), 0);
  EXPECT_EQ(writer.Await().code, 0) << "the link is as good as new";
}

// The receiver alone writes its pool, so a stopped writer's blocks are free at once. The receiver
// takes its own kernels off the card; what the writer does when it goes on harms nobody, and the
// pair makes a new communicator.
TEST_F(NcclTest, AStoppedWriterHoldsNoBlocksAndTheNextTransferWorks) {
  CardEnds card(IpcLayout(0), 64, 64, kNccl);
  card.ends.StartReceiver();
  Writer writer = StartWriter(0, 64);
  const TransferId id = TransferId::Random();
  writer.Ship(card.ends.Expect(id, 1, Range(0, 40)), 0, /*pause_us=*/20'000);
  const absl::Time end = absl::Now() + kPatience;
  while (card.ends.receiver->BytesArrived(id, 1) == 0 && absl::Now() < end) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  writer.Stop();
  card.ends.receiver->Cancel(id, 1);
  card.ends.record.AwaitQuiet(id, 1);
  EXPECT_EQ(card.ends.receiver->Counters().fenced_transfers, 0);
  card.target.Fill(std::byte{0x5a});
  writer.Signal(SIGCONT);
  EXPECT_NE(writer.Await().code, 0);
  EXPECT_TRUE(card.Holds(0, 64, std::byte{0x5a})) << "a late byte landed";
  const TransferId next = TransferId::Random();
  writer.Ship(card.ends.Expect(next, 1, Range(0, 40)), 0);
  EXPECT_EQ(writer.Await().code, 0);
}

// A kernel that waits for a dead peer would stay on the card for ever.
TEST_F(NcclTest, AKilledWriterLeavesQuietBlocksAndNoWorkOnTheCard) {
  CardEnds card(IpcLayout(0), 256, 256, kNccl);
  card.ends.StartReceiver();
  std::mt19937_64 random(3);
  for (uint64_t round = 1; round <= 3; ++round) {
    Writer writer = StartWriter(0, 256);
    const TransferId warm = TransferId::Random();
    writer.Ship(card.ends.Expect(warm, round, Range(0, 8)), 0);
    EXPECT_EQ(writer.Await().code, 0);
    const TransferId id = TransferId::Random();
    writer.Ship(card.ends.Expect(id, round, Range(0, 256)), 0);
    absl::SleepFor(absl::Microseconds(200 + random() % 5000));
    writer.Signal(SIGKILL);
    card.ends.record.AwaitQuiet(id, round);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    card.target.Fill(std::byte{0x5a});
    absl::SleepFor(absl::Milliseconds(50));
    EXPECT_TRUE(card.Holds(0, 256, std::byte{0x5a})) << "a late byte landed";
  }
}

TEST_F(NcclTest, AReceiverThatEndsFailsTheTransferAtOnce) {
  CardEnds card(IpcLayout(0), 64, 64, kNccl);
  card.ends.StartReceiver();
  Writer writer = StartWriter(0, 64);
  const TransferId warm = TransferId::Random();
  writer.Ship(card.ends.Expect(warm, 1, Range(0, 8)), 0);
  EXPECT_EQ(writer.Await().code, 0);
  const TransferId cut = TransferId::Random();
  writer.Ship(card.ends.Expect(cut, 1, Range(0, 8)), 0, /*pause_us=*/20'000);
  card.ends.receiver = nullptr;
  EXPECT_EQ(writer.Await().code, static_cast<int>(absl::StatusCode::kUnavailable));
}

TEST_F(NcclTest, TwoPoolsOfOneCardAreRefusedWithTheReason) {
  CardEnds card(IpcLayout(1), 16, 16, kNccl);
  card.ends.Start();
  const TransferId id = card.ends.ShipOne();
  EXPECT_THAT(card.ends.record.AwaitDone(id, 1).status.ToString(),
              ::testing::HasSubstr("both KV pools lie on one card"));
}

// Sends of `bytes` from card 1 to card 0 by NCCL alone: seconds each.
double SecondsOfPlainSends(size_t bytes) {
  void* const library = *::tandem::cuda::OpenCudaLibrary("libnccl.so.2");
  decltype(&ncclCommInitAll) init = nullptr;
  decltype(&ncclGroupStart) start = nullptr;
  decltype(&ncclGroupEnd) end = nullptr;
  decltype(&ncclSend) send = nullptr;
  decltype(&ncclRecv) receive = nullptr;
  decltype(&ncclCommDestroy) destroy = nullptr;
  EXPECT_OK(::tandem::cuda::FindCudaFunction(library, "ncclCommInitAll", &init));
  EXPECT_OK(::tandem::cuda::FindCudaFunction(library, "ncclGroupStart", &start));
  EXPECT_OK(::tandem::cuda::FindCudaFunction(library, "ncclGroupEnd", &end));
  EXPECT_OK(::tandem::cuda::FindCudaFunction(library, "ncclSend", &send));
  EXPECT_OK(::tandem::cuda::FindCudaFunction(library, "ncclRecv", &receive));
  EXPECT_OK(::tandem::cuda::FindCudaFunction(library, "ncclCommDestroy", &destroy));
  std::array<ncclComm_t, 2> communicators;
  const std::array<int, 2> cards = {0, 1};
  EXPECT_EQ(init(communicators.data(), 2, cards.data()), ncclSuccess);
  std::array<void*, 2> buffers;
  std::array<cudaStream_t, 2> streams;
  for (size_t card = 0; card < 2; ++card) {
    EXPECT_EQ(cudaSetDevice(static_cast<int>(card)), cudaSuccess);
    EXPECT_EQ(cudaMalloc(&buffers[card], bytes), cudaSuccess);
    EXPECT_EQ(cudaMemset(buffers[card], 0x5b, bytes), cudaSuccess);
    EXPECT_EQ(cudaStreamCreate(&streams[card]), cudaSuccess);
  }
  std::vector<double> seconds;
  for (int round = 0; round < 20; ++round) {
    seconds.push_back(SecondsOf([&] {
      start();
      receive(buffers[0], bytes, ncclUint8, 1, communicators[0], streams[0]);
      send(buffers[1], bytes, ncclUint8, 0, communicators[1], streams[1]);
      EXPECT_EQ(end(), ncclSuccess);
      for (size_t card = 0; card < 2; ++card) {
        cudaSetDevice(static_cast<int>(card));
        EXPECT_EQ(cudaStreamSynchronize(streams[card]), cudaSuccess);
      }
    }));
  }
  for (size_t card = 0; card < 2; ++card) {
    cudaSetDevice(static_cast<int>(card));
    destroy(communicators[card]);
    cudaFree(buffers[card]);
    cudaStreamDestroy(streams[card]);
  }
  cudaSetDevice(0);
  return Median(seconds);
}

TEST_F(NcclTest, SaysWhatATransferTakes) {
  const bool two = NumCards() > 1;
  CardEnds card(IpcLayout(0), 256, 256, kNccl, two ? 1 : 0);
  card.ends.Start();
  Writer writer = StartWriter(0, 256);
  for (const int count : {1, 32, 256}) {
    const double bytes = count * static_cast<double>(IpcLayout(0).BlockBytes());
    std::vector<double> one, apart;
    for (int round = 0; round < (two ? 20 : 5); ++round) {
      if (two) {
        const TransferId id = TransferId::Random();
        ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, 1, Range(0, count))));
        one.push_back(SecondsOf([&] {
          card.ends.PushAll(id, 1, Range(0, count));
          card.ends.sender->Finish(id, 1);
          EXPECT_OK(card.ends.record.AwaitDone(id, 1).status);
        }));
      }
      const TransferId id = TransferId::Random();
      writer.Ship(card.ends.Expect(id, 1, Range(0, count)), 0);
      const Writer::Result sent = writer.Await();
      ASSERT_EQ(sent.code, 0);
      apart.push_back(sent.microseconds / 1e6);
    }
    std::printf("%3d blocks, %6.1f MB: two processes %7.0f us, %5.1f GB/s\n", count, bytes / 1e6,
                Median(apart) * 1e6, bytes / Median(apart) / 1e9);
    if (!two) continue;
    const double plain = SecondsOfPlainSends(static_cast<size_t>(bytes));
    std::printf("    one process %7.0f us, %5.1f GB/s; plain sends %7.0f us, %5.1f GB/s\n",
                Median(one) * 1e6, bytes / Median(one) / 1e9, plain * 1e6, bytes / plain / 1e9);
    if (count == 1) {
      Figure("nccl_1_block_us", Median(apart) * 1e6);
    } else {
      Figure("nccl_of_plain_sends", bytes, plain / Median(one));
      Figure("nccl_two_processes_of_plain_sends", bytes, plain / Median(apart));
      Figure("nccl_two_processes_GBps", bytes, bytes / Median(apart) / 1e9);
    }
  }
}

}  // namespace
}  // namespace tandem::kvtransfer
