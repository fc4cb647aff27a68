// A KV pool in a card's memory beside one with the same bytes in the host's: every function of the
// store, many threads, and transfers between two pools of the card.
#include <atomic>
#include <chrono>
#include <cuda_runtime.h>
#include <thread>

#include "gtest/gtest.h"

#include "kvtransfer/transport/kv_transport.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {
namespace {

bool HaveCard() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}
#define SKIP_WITHOUT_CARD() \
  if (!HaveCard()) GTEST_SKIP() << "no CUDA card here"

void Check(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

// A pool of the card with the bytes of a TestPool, and its store.
class DevicePool {
 public:
  explicit DevicePool(const TestPool& host) : region_(host.region()) {
    Check(cudaMalloc(reinterpret_cast<void**>(&region_.base), region_.TotalBytes()));
    Check(cudaMemcpy(region_.base, host.region().base, region_.TotalBytes(), cudaMemcpyDefault));
    region_.memory = KvMemoryKind::kDevice;
    region_.fd = -1;
    auto store = MakeKvStore(region_);
    EXPECT_OK(store.status());
    store_ = *std::move(store);
  }
  ~DevicePool() {
    store_ = nullptr;
    cudaFree(region_.base);
  }

  const KvRegion& region() const { return region_; }
  const KvStore& store() const { return *store_; }
  std::vector<std::byte> Bytes() const {
    std::vector<std::byte> bytes(region_.TotalBytes());
    Check(cudaMemcpy(bytes.data(), region_.base, bytes.size(), cudaMemcpyDefault));
    return bytes;
  }

 private:
  KvRegion region_;
  std::unique_ptr<KvStore> store_;
};

std::string Text(const KvLayout& l, const BlockRun& run) {
  return fmt::format(
      "{} layers, {} heads of {}, blocks of {}, {}; layers [{}, +{}), heads [{}, +{})",
      l.num_layers, l.num_kv_heads, l.head_dim, l.block_size, DTypeName(l.dtype), run.layer_begin,
      run.layer_count, run.heads.begin, run.heads.count);
}

// Where two arrays differ first.
template <typename A, typename B>
::testing::AssertionResult Equal(const A& got, const B& wanted) {
  if (got.size() != wanted.size()) return ::testing::AssertionFailure() << "sizes";
  size_t bad = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] != wanted[i] && bad++ == 0) first = i;
  }
  if (bad == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << bad << " of " << got.size() << " differ, first " << first
                                       << ": got " << static_cast<uint64_t>(got[first])
                                       << ", wanted " << static_cast<uint64_t>(wanted[first]);
}

// Layouts with pages of 256 bytes to 64 KiB, also some that are no whole stripes of the digest.
const KvLayout kLayouts[] = {
    {3, 2, 8, 16, DType::kBFloat16},    {2, 3, 24, 16, DType::kBFloat16},
    {4, 4, 128, 16, DType::kBFloat16},  {2, 1, 64, 32, DType::kFloat32},
    {2, 8, 128, 256, DType::kBFloat16}, {2, 5, 40, 16, DType::kFloat32},
};

TEST(DeviceStore, WhatItCannotDoIsSaid) {
  SKIP_WITHOUT_CARD();
  TestPool host(SmallLayout(), 4);
  KvRegion region = host.region();
  region.memory = KvMemoryKind::kDevice;
  EXPECT_EQ(MakeKvStore(region).status().code(), absl::StatusCode::kInvalidArgument);
  const DevicePool pool(host);
  EXPECT_EQ(pool.store().HostAddress(0), nullptr);
  EXPECT_EQ(pool.store().Export().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(ShmTransport()->Register(&pool.store(), {}).ok());
}

TEST(DeviceStore, DigestsAndRunsAreTheHosts) {
  SKIP_WITHOUT_CARD();
  std::mt19937_64 random(5);
  for (const KvLayout& layout : kLayouts) {
    TestPool host(layout, 23, /*first_kv_head=*/3);
    host.FillRandom(random());
    const DevicePool device(host);
    const auto expected = *MakeKvStore(host.region());
    for (int round = 0; round < 12; ++round) {
      const auto blocks = RandomBlocks(&random, 23, 1 + random() % 23);
      BlockRun run;
      run.layer_begin = static_cast<int>(random() % static_cast<uint64_t>(layout.num_layers));
      run.layer_count =
          1 +
          static_cast<int>(random() % static_cast<uint64_t>(layout.num_layers - run.layer_begin));
      const int first = static_cast<int>(random() % static_cast<uint64_t>(layout.num_kv_heads));
      run.heads = {
          3 + first,
          1 + static_cast<int>(random() % static_cast<uint64_t>(layout.num_kv_heads - first))};
      run.source_blocks = blocks;
      run.target_blocks = blocks;
      SCOPED_TRACE(Text(layout, run));
      std::vector<uint64_t> got(
          static_cast<size_t>(run.layer_count * run.heads.count) * blocks.size(), 1);
      std::vector<uint64_t> wanted(got.size());
      device.store().Digest(run, got);
      expected->Digest(run, wanted);
      ASSERT_TRUE(Equal(got, wanted));

      const size_t bytes = run.Bytes(layout);
      const auto wanted_bytes = expected->AllocateStaging(bytes);
      std::vector<uint64_t> wanted_digests(blocks.size(), 77);
      expected->GatherRun(run, wanted_bytes.get(), wanted_digests);
      const auto pinned = device.store().AllocateStaging(bytes);
      std::vector<std::byte> plain(bytes);
      for (std::byte* to : {pinned.get(), plain.data()}) {
        std::fill(to, to + bytes, std::byte{0xee});
        std::vector<uint64_t> digests(blocks.size(), 77);
        device.store().GatherRun(run, to, digests);
        ASSERT_TRUE(Equal(std::span(to, bytes), std::span(wanted_bytes.get(), bytes)));
        ASSERT_TRUE(Equal(digests, wanted_digests));
      }
      TestPool target(layout, 40, 3);
      TestPool wanted_target(layout, 40, 3);
      const auto target_blocks = RandomBlocks(&random, 40, blocks.size());
      run.target_blocks = target_blocks;
      std::vector<uint64_t> copy_digests(blocks.size(), 0);
      std::vector<uint64_t> wanted_copy(blocks.size(), 0);
      EXPECT_TRUE(device.store().CopyRun(run, expected->shape(), target.region().base,
                                         CopyMode::kCached, copy_digests, [] { return true; }));
      EXPECT_TRUE(expected->CopyRun(run, expected->shape(), wanted_target.region().base,
                                    CopyMode::kCached, wanted_copy, [] { return true; }));
      ASSERT_TRUE(Equal(target.memory(), wanted_target.memory()));
      ASSERT_TRUE(Equal(copy_digests, wanted_copy));
    }
  }
}

// Any offsets and lengths, from a byte to more than a slot holds, in few pieces and in thousands.
TEST(DeviceStore, PiecesOfAnyShape) {
  SKIP_WITHOUT_CARD();
  std::mt19937_64 random(6);
  TestPool host({4, 4, 128, 16, DType::kBFloat16}, 40);
  host.FillRandom(1);
  DevicePool device(host);
  const auto expected = *MakeKvStore(host.region());
  const size_t total = host.memory().size();
  for (int round = 0; round < 40; ++round) {
    const uint64_t alignment = std::array{1, 4, 16, 4096}[random() % 4];
    const uint64_t longest = std::array{64, 5000, 70'000, 1'500'000}[random() % 4];
    const uint64_t most = std::min<uint64_t>(1 + random() % 5000, 4 * total / longest);
    std::vector<CopyPiece> pieces;
    uint64_t at = 0;
    for (uint64_t i = 0; i < most; ++i) {
      CopyPiece piece;
      piece.bytes = std::max(alignment, (1 + random() % longest) / alignment * alignment);
      piece.source_offset = random() % (total - piece.bytes) / alignment * alignment;
      piece.target_offset = at;
      at += piece.bytes + random() % 3 * alignment;
      pieces.push_back(piece);
    }
    SCOPED_TRACE(fmt::format("{} pieces, at most {} bytes, aligned to {}, {} bytes in all",
                             pieces.size(), longest, alignment, at));
    std::vector<std::byte> wanted(at, std::byte{0xee});
    expected->Gather(pieces, wanted.data());
    std::vector<std::byte> plain(at, std::byte{0xee});
    device.store().Gather(pieces, plain.data());
    ASSERT_TRUE(Equal(plain, wanted));
    const auto pinned = device.store().AllocateStaging(at);
    std::fill(pinned.get(), pinned.get() + at, std::byte{0xee});
    device.store().Gather(pieces, pinned.get());
    ASSERT_TRUE(Equal(std::span(pinned.get(), at), wanted));

    // Back into the pool, to places that do not overlap.
    std::vector<CopyPiece> back;
    uint64_t pool_at = 0;
    for (const CopyPiece& piece : pieces) {
      if (pool_at + piece.bytes > total) break;
      back.push_back({piece.target_offset, pool_at, piece.bytes});
      pool_at += piece.bytes + random() % 3 * alignment;
    }
    const uint64_t seed = random();
    for (size_t i = 0; i < at; ++i) {
      plain[i] = pinned[i] = static_cast<std::byte>((i * i * 2654435761u + seed) >> 16);
    }
    const std::byte* from = round % 2 == 0 ? plain.data() : pinned.get();
    expected->Scatter(from, back);
    device.store().Scatter(from, back);
    ASSERT_TRUE(Equal(device.Bytes(), host.memory()));
  }
}

TEST(DeviceStore, ManyThreads) {
  SKIP_WITHOUT_CARD();
  constexpr int kThreads = 12;
  constexpr int kBlocksEach = 8;
  TestPool host({4, 4, 128, 16, DType::kBFloat16}, kThreads * kBlocksEach);
  host.FillRandom(2);
  const DevicePool device(host);
  const auto expected = *MakeKvStore(host.region());
  const size_t block_bytes = host.region().layout.BlockLayerBytes();
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(static_cast<uint64_t>(t));
      std::vector<int32_t> blocks;
      for (int i = 0; i < kBlocksEach; ++i) blocks.push_back(t * kBlocksEach + i);
      const auto staging = device.store().AllocateStaging(kBlocksEach * block_bytes);
      for (int round = 0; round < 100; ++round) {
        const int layer = static_cast<int>(random() % 4);
        // New bytes into the own blocks, and out again by two ways.
        std::vector<CopyPiece> pieces;
        for (size_t i = 0; i < blocks.size(); ++i) {
          pieces.push_back(
              {i * block_bytes, device.store().shape().BlockOffset(layer, blocks[i]), block_bytes});
        }
        std::vector<std::byte> sent(kBlocksEach * block_bytes, static_cast<std::byte>(random()));
        for (size_t i = 0; i < sent.size(); i += 8) sent[i] = static_cast<std::byte>(random());
        std::copy(sent.begin(), sent.end(), staging.get());
        device.store().Scatter(staging.get(), pieces);
        expected->Scatter(sent.data(), pieces);
        const BlockRun run = {layer, 1, device.store().shape().heads(), blocks, blocks};
        std::vector<uint64_t> digests(blocks.size(), 0);
        std::fill(staging.get(), staging.get() + sent.size(), std::byte{0});
        device.store().GatherRun(run, staging.get(), digests);
        if (!std::equal(sent.begin(), sent.end(), staging.get())) ++wrong;
        if (digests != expected->DigestRun(run)) ++wrong;
        if (digests != device.store().DigestRun(run)) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(Equal(device.Bytes(), host.memory()));
}

TEST(DeviceStore, BlocksTravelBetweenPoolsOfTheCard) {
  SKIP_WITHOUT_CARD();
  std::mt19937_64 random(4);
  for (const KvLayout& layout : kLayouts) {
    // From card to card, from card to host, from host to card, each way.
    for (int round = 0; round < 6; ++round) {
      const std::string transport = round < 3 ? "shm_ring" : "tcp";
      Ends ends(transport, layout, 60, 70);
      const DevicePool source(ends.source);
      const DevicePool target(ends.target);
      if (round % 3 != 2) ends.sender_options.region = source.region();
      if (round % 3 != 1) ends.receiver_options.region = target.region();
      ends.Start();
      const TransferId id = TransferId::Random();
      const auto from = RandomBlocks(&random, 60, 50);
      const auto to = RandomBlocks(&random, 70, 50);
      ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, to)));
      ends.PushAll(id, 1, from);
      ends.sender->Finish(id, 1);
      const Record::Receiver got = ends.record.AwaitQuiet(id, 1);
      EXPECT_EQ(got.sealed, 1) << got.status;
      EXPECT_EQ(got.stats.transport, transport);
      EXPECT_OK(ends.record.AwaitDone(id, 1).status);
      if (round % 3 != 1) {
        const auto bytes = target.Bytes();
        std::copy(bytes.begin(), bytes.end(), ends.target.memory().begin());
      }
      ends.ExpectEqualBlocks(from, to);
      // Every other block is as it was.
      for (int32_t block = 0; block < 70; ++block) {
        if (std::find(to.begin(), to.end(), block) != to.end()) continue;
        EXPECT_EQ(ends.target.BlockBytes(block), std::string(layout.BlockBytes(), '\xee'));
      }
    }
  }
}

// Not a test of speed: says what the machine does, for whoever reads the log.
TEST(DeviceStore, SaysItsRates) {
  SKIP_WITHOUT_CARD();
  const KvLayout layout = {28, 4, 128, 16, DType::kBFloat16};  // Qwen2.5-7B
  TestPool host(layout, 512);
  host.FillRandom(3);
  const DevicePool device(host);
  const auto rate = [](const char* what, double bytes, auto work) {
    work();
    std::vector<double> seconds;
    for (int i = 0; i < 30; ++i) {
      const auto start = std::chrono::steady_clock::now();
      work();
      seconds.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(seconds.begin(), seconds.end());
    fmt::print("  {:<44} {:8.1f} us, {:6.2f} GB/s\n", what, seconds[15] * 1e6,
               bytes / seconds[15] / 1e9);
  };
  for (const size_t count : {1, 32, 512}) {
    std::mt19937_64 random(1);
    const auto blocks = RandomBlocks(&random, 512, count);
    const BlockRun run = {3, 1, {0, 4}, blocks, blocks};
    const double bytes = static_cast<double>(run.Bytes(layout));
    const auto pinned = device.store().AllocateStaging(run.Bytes(layout));
    std::vector<std::byte> plain(run.Bytes(layout));
    std::vector<uint64_t> digests(count * 4, 0);
    std::vector<CopyPiece> pieces;
    for (size_t i = 0; i < count; ++i) {
      pieces.push_back({i * layout.BlockLayerBytes(),
                        device.store().shape().BlockOffset(3, blocks[i]),
                        layout.BlockLayerBytes()});
    }
    fmt::print("{} blocks, {:.0f} KiB\n", count, bytes / 1024);
    rate("gather and digest, pinned", bytes,
         [&] { device.store().GatherRun(run, pinned.get(), std::span(digests).first(count)); });
    rate("gather and digest, pageable", bytes,
         [&] { device.store().GatherRun(run, plain.data(), std::span(digests).first(count)); });
    rate("scatter, pinned", bytes, [&] { device.store().Scatter(pinned.get(), pieces); });
    rate("scatter, pageable", bytes, [&] { device.store().Scatter(plain.data(), pieces); });
    rate("digest", bytes, [&] { device.store().Digest(run, digests); });
    void* copy = nullptr;
    Check(cudaMalloc(&copy, plain.size()));
    rate("cudaMemcpy to pinned, for comparison", bytes,
         [&] { Check(cudaMemcpy(pinned.get(), copy, plain.size(), cudaMemcpyDefault)); });
    rate("cudaMemcpy from pinned, for comparison", bytes,
         [&] { Check(cudaMemcpy(copy, pinned.get(), plain.size(), cudaMemcpyDefault)); });
    cudaFree(copy);
  }
  // End to end over loopback.
  for (int round = 0; round < 3; ++round) {
    Ends ends("auto", layout, 300, 300);
    const DevicePool source(ends.source);
    const DevicePool target(ends.target);
    if (round % 3 != 2) ends.sender_options.region = source.region();
    if (round % 3 != 1) ends.receiver_options.region = target.region();
    if (round != 0) ends.sender_options.transports = ends.receiver_options.transports = "tcp";
    ends.Start();
    std::vector<int32_t> blocks(256);
    for (int32_t i = 0; i < 256; ++i) blocks[static_cast<size_t>(i)] = i;
    for (int i = 0; i < 3; ++i) {
      const TransferId id = TransferId::Random();
      ASSERT_OK(ends.sender->Open(ends.Expect(id, 1, blocks)));
      const auto start = std::chrono::steady_clock::now();
      ends.PushAll(id, 1, blocks);
      ends.sender->Finish(id, 1);
      EXPECT_EQ(ends.record.AwaitQuiet(id, 1).sealed, 1);
      const double seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      fmt::print(
          "{}: 256 blocks of 28 layers sealed in {:.1f} ms, {:.2f} GB/s\n",
          std::array{"card to card", "card to host", "host to card"}[static_cast<size_t>(round)],
          seconds * 1e3, 256.0 * static_cast<double>(layout.BlockBytes()) / seconds / 1e9);
    }
  }
}

}  // namespace
}  // namespace tandem::kvtransfer
