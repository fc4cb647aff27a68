// The shm_ring transport between pools of a card, as between two cards without peer access:
// equality, faults, and what it reaches beside plain copies over the link, both directions running.
#include <chrono>
#include <csignal>
#include <cstdio>
#include <deque>
#include <functional>
#include <sys/mman.h>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "kvtransfer/store/kv_store.h"
#include "tests/gpu/card_ends.h"

namespace tandem::kvtransfer {
namespace {

constexpr char kRing[] = "shm";

class ShmRing : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HaveCard()) GTEST_SKIP() << "no CUDA card here";
  }
};

double SecondsOf(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

TEST_F(ShmRing, BlocksOfEveryLayoutArrive) {
  std::mt19937_64 random(4);
  for (int number = 0; number < kNumIpcLayouts; ++number) {
    const KvLayout layout = IpcLayout(number);
    const int blocks = layout.BlockBytes() > (64 << 10) ? 50 : 600;
    CardEnds card(layout, blocks, blocks + 10, kRing);
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
      EXPECT_EQ(got.stats.transport, "shm_ring");
      EXPECT_OK(card.ends.record.AwaitDone(id, 1).status);
      card.target.CopyTo(&card.ends.target);
      card.ends.ExpectEqualBlocks(from, to);
    }
  }
}

TEST_F(ShmRing, APoolOfTheHostAndOneOfTheCardMeet) {
  for (const bool sender_on_card : {true, false}) {
    CardEnds card(IpcLayout(0), 16, 16, kRing);
    if (sender_on_card) {
      card.ends.receiver_options.region = card.ends.target.region();
    } else {
      card.ends.sender_options.region = card.ends.source.region();
    }
    card.ends.Start();
    const TransferId id = card.ends.ShipOne();
    const Record::Receiver got = card.ends.record.AwaitQuiet(id, 1);
    EXPECT_EQ(got.sealed, 1) << got.status;
    EXPECT_EQ(got.stats.transport, "shm_ring");
    if (!sender_on_card) card.target.CopyTo(&card.ends.target);
    card.ends.ExpectEqualBlocks({1}, {9});
  }
}

// Whenever a transfer is cancelled: once it is quiet, nothing of it lands any more.
TEST_F(ShmRing, NothingLandsAfterQuiet) {
  CardEnds card(IpcLayout(0), 128, 128, kRing);
  card.ends.Start();
  std::mt19937_64 random(9);
  int cancelled = 0;
  for (uint64_t round = 1; round <= 60; ++round) {
    card.target.Fill(std::byte{0xee});
    const TransferId id = TransferId::Random();
    ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, round, Range(0, 128))));
    card.ends.PushAll(id, round, Range(0, 128));
    card.ends.sender->Finish(id, round);
    absl::SleepFor(absl::Microseconds(random() % 3000));
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

TEST_F(ShmRing, AbortedTransfersLeaveNothingBehind) {
  CardEnds card(IpcLayout(0), 64, 64, kRing);
  card.ends.Start();
  card.ends.record.AwaitQuiet(card.ends.ShipOne(), 1);  // connects, and opens the windows
  size_t before = 0, after = 0, total = 0;
  for (uint64_t round = 1; round <= 1000; ++round) {
    const TransferId id = TransferId::Random();
    ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, 1, Range(0, 32))));
    card.ends.PushAll(id, 1, Range(0, 32));
    if (round % 3 != 0) absl::SleepFor(absl::Microseconds(round % 97));
    card.ends.sender->Abort(id, 1);
    card.ends.record.AwaitDone(id, 1);
    card.ends.receiver->Cancel(id, 1);
    card.ends.record.AwaitQuiet(id, 1);
    if (round == 20) {
      ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
    }
  }
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_EQ(before, after);
  // All slots of the ring are there: a transfer of many frames gets through.
  const TransferId id = TransferId::Random();
  ASSERT_OK(card.ends.sender->Open(card.ends.Expect(id, 1, Range(0, 64))));
  card.ends.PushAll(id, 1, Range(0, 64));
  card.ends.sender->Finish(id, 1);
  EXPECT_EQ(card.ends.record.AwaitQuiet(id, 1).sealed, 1);
}

// The receiver alone writes its pool, so a stopped writer's blocks are free at once, and what it
// does when it goes on harms nobody.
TEST_F(ShmRing, AStoppedWriterHoldsNoBlocksAndNothingLateLands) {
  CardEnds card(IpcLayout(0), 64, 64, kRing);
  card.ends.StartReceiver();
  Writer writer(0, 64, kRing);
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

TEST_F(ShmRing, AKilledWriterLeavesQuietBlocksAndNoMemory) {
  CardEnds card(IpcLayout(0), 256, 256, kRing);
  card.ends.StartReceiver();
  std::mt19937_64 random(3);
  for (uint64_t round = 1; round <= 3; ++round) {
    Writer writer(0, 256, kRing);
    const TransferId warm = TransferId::Random();
    writer.Ship(card.ends.Expect(warm, round, Range(0, 8)), 0);
    EXPECT_EQ(writer.Await().code, 0);
    const TransferId id = TransferId::Random();
    writer.Ship(card.ends.Expect(id, round, Range(0, 256)), 0);
    absl::SleepFor(absl::Microseconds(200 + random() % 5000));
    writer.Signal(SIGKILL);
    card.ends.record.AwaitQuiet(id, round);
    card.target.Fill(std::byte{0x5a});
    absl::SleepFor(absl::Milliseconds(50));
    EXPECT_TRUE(card.Holds(0, 256, std::byte{0x5a})) << "a late byte landed";
  }
}

TEST_F(ShmRing, AReceiverThatEndsFailsTheTransfers) {
  CardEnds card(IpcLayout(0), 64, 64, kRing);
  card.ends.Start();
  const TransferId id = card.ends.ShipOne();
  EXPECT_EQ(card.ends.record.AwaitQuiet(id, 1).sealed, 1);
  const TransferId cut = TransferId::Random();
  ASSERT_OK(card.ends.sender->Open(card.ends.Expect(cut, 1, Range(0, 8))));
  card.ends.receiver = nullptr;
  EXPECT_EQ(card.ends.record.AwaitDone(cut, 1).status.code(), absl::StatusCode::kUnavailable);
}

// Copies of 4 MiB between the card and pinned memory, each direction on a stream of its own, at
// the same time: seconds until both have moved `bytes`, and each alone.
struct LinkRates {
  double out = 0, in = 0, out_of_both = 0;  // bytes per second
};
LinkRates MeasureLink(size_t bytes) {
  constexpr size_t kChunk = size_t{4} << 20;
  std::byte *out_host, *in_host, *device;
  EXPECT_EQ(cudaHostAlloc(&out_host, 8 * kChunk, 0), cudaSuccess);
  EXPECT_EQ(cudaHostAlloc(&in_host, 8 * kChunk, 0), cudaSuccess);
  EXPECT_EQ(cudaMalloc(&device, 2 * kChunk), cudaSuccess);
  std::array<cudaStream_t, 2> streams;
  for (cudaStream_t& stream : streams) EXPECT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  const auto move = [&](bool out, bool in) {
    return SecondsOf([&] {
      for (size_t at = 0; at < bytes; at += kChunk) {
        const size_t slot = at / kChunk % 8 * kChunk;
        if (out) {
          cudaMemcpyAsync(out_host + slot, device, kChunk, cudaMemcpyDeviceToHost, streams[0]);
        }
        if (in) {
          cudaMemcpyAsync(device + kChunk, in_host + slot, kChunk, cudaMemcpyHostToDevice,
                          streams[1]);
        }
      }
      for (cudaStream_t stream : streams) EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    });
  };
  std::vector<double> out, in, both;
  for (int i = 0; i < 7; ++i) {
    out.push_back(move(true, false));
    in.push_back(move(false, true));
    both.push_back(move(true, true));
  }
  for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
  cudaFree(device);
  cudaFreeHost(out_host);
  cudaFreeHost(in_host);
  const auto total = static_cast<double>(bytes);
  return {total / Median(out), total / Median(in), total / Median(both)};
}

// A transfer alone, and two that go opposite ways at once, beside what the link reaches. Here both
// pools are one card's, so a transfer crosses its link twice, out and in, and two of them load each
// direction with the bytes of both: the floor of one is bytes / out_of_both, of two twice that.
TEST_F(ShmRing, SaysWhatATransferTakes) {
  const LinkRates link = MeasureLink(size_t{256} << 20);
  std::printf("pinned copies: out %.1f, in %.1f, both at once %.1f GB/s each\n", link.out / 1e9,
              link.in / 1e9, link.out_of_both / 1e9);
  CardEnds there(IpcLayout(0), 256, 256, kRing), back(IpcLayout(0), 256, 256, kRing);
  there.ends.Start();
  back.ends.Start();
  const auto ship = [](CardEnds* card, int count) {
    const TransferId id = TransferId::Random();
    EXPECT_OK(card->ends.sender->Open(card->ends.Expect(id, 1, Range(0, count))));
    card->ends.PushAll(id, 1, Range(0, count));
    card->ends.sender->Finish(id, 1);
    EXPECT_OK(card->ends.record.AwaitDone(id, 1).status);
  };
  Writer writer(0, 256, kRing);
  for (const int count : {1, 32, 256}) {
    std::vector<double> alone, both, two;
    for (int round = 0; round < (count > 100 ? 12 : 40); ++round) {
      alone.push_back(SecondsOf([&] { ship(&there, count); }));
      both.push_back(SecondsOf([&] {
        std::thread other([&] { ship(&back, count); });
        ship(&there, count);
        other.join();
      }));
      const TransferId id = TransferId::Random();
      writer.Ship(there.ends.Expect(id, 1, Range(0, count)), 0);
      const Writer::Result sent = writer.Await();
      ASSERT_EQ(sent.code, 0);
      EXPECT_EQ(sent.transport, "shm_ring");
      two.push_back(sent.microseconds / 1e6);
    }
    const double bytes = count * static_cast<double>(IpcLayout(0).BlockBytes());
    std::printf(
        "%3d blocks, %6.1f MB: alone %7.0f us %5.1f GB/s (%.2f of the link), two at once %7.0f us "
        "%5.1f GB/s each (%.2f), two processes %7.0f us %5.1f GB/s\n",
        count, bytes / 1e6, Median(alone) * 1e6, bytes / Median(alone) / 1e9,
        bytes / Median(alone) / link.out_of_both, Median(both) * 1e6, bytes / Median(both) / 1e9,
        2 * bytes / Median(both) / link.out_of_both, Median(two) * 1e6, bytes / Median(two) / 1e9);
    if (count == 1) {
      Figure("shm_ring_1_block_us", Median(alone) * 1e6);
      Figure("shm_ring_two_processes_1_block_us", Median(two) * 1e6);
    } else {
      Figure("shm_ring_of_pinned", bytes, bytes / Median(alone) / link.out_of_both);
      Figure("shm_ring_two_of_pinned", bytes, 2 * bytes / Median(both) / link.out_of_both);
      Figure("shm_ring_two_processes_GBps", bytes, bytes / Median(two) / 1e9);
    }
  }
}

// What the window itself does, without the channel: small and large frames out and in.
TEST_F(ShmRing, SaysWhatTheWindowReaches) {
  constexpr int kBlocks = 512;
  constexpr size_t kSlot = size_t{4} << 20, kSlots = 8;
  const KvLayout layout = IpcLayout(0);
  TestPool host(layout, kBlocks);
  const CardPool pool(host);
  const auto store = *MakeKvStore(pool.region());
  std::printf("NUMA node of the card: %d\n", store->HostNode());
  void* memory =
      mmap(nullptr, kSlot * kSlots, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  {
    auto window = *store->OpenWindow({static_cast<std::byte*>(memory), kSlot * kSlots}, kSlot);
    const auto from = Range(0, kBlocks);
    for (const size_t blocks : {1, 32, 64, 128}) {  // of one layer, 32 KiB each
      const BlockRun run = {0, 1, {0, 4}, std::span(from).first(blocks), {}};
      const size_t bytes = run.Bytes(layout);
      constexpr int kFrames = 32;
      std::vector<double> out, in;
      for (int round = 0; round < 9; ++round) {
        out.push_back(SecondsOf([&] {
          std::deque<std::unique_ptr<Gathering>> under_way;
          for (size_t i = 0; i < kFrames; ++i) {
            if (under_way.size() == kStagedDepth) {
              (void)under_way.front()->Wait();
              under_way.pop_front();
            }
            under_way.push_back(window->Gather(run, i % kSlots * kSlot));
          }
          for (auto& each : under_way) (void)each->Wait();
        }));
        std::vector<CopyPiece> pieces;
        for (size_t i = 0; i < blocks; ++i) {
          pieces.push_back({i * layout.BlockLayerBytes(),
                            store->shape().BlockOffset(0, from[i * 3 % kBlocks]),
                            layout.BlockLayerBytes()});
        }
        in.push_back(SecondsOf([&] {
          std::deque<std::unique_ptr<Fetched>> under_way;
          for (size_t i = 0; i < kFrames; ++i) {
            if (under_way.size() == kStagedDepth) {
              (void)under_way.front()->Wait();
              under_way.front()->Scatter(pieces);
              under_way.pop_front();
            }
            under_way.push_back(window->Fetch(i % kSlots * kSlot, bytes));
          }
          for (auto& each : under_way) {
            (void)each->Wait();
            each->Scatter(pieces);
          }
        }));
      }
      const double each = static_cast<double>(bytes);
      std::printf("frames of %7zu bytes: out %6.1f us each, %5.1f GB/s; in %6.1f us, %5.1f GB/s\n",
                  bytes, Median(out) / kFrames * 1e6, each * kFrames / Median(out) / 1e9,
                  Median(in) / kFrames * 1e6, each * kFrames / Median(in) / 1e9);
    }
  }
  munmap(memory, kSlot * kSlots);
}

}  // namespace
}  // namespace tandem::kvtransfer
