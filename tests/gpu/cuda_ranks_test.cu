// Sums over ranks: the kernels that meet on the device, which this test lets run on one card since
// they are small enough to be there together, and CudaRanks as engines use it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

#include "engine/kernels/cuda/cuda_ranks.h"
#include "engine/kernels/cuda/rank_sum.h"
#include "tests/gpu/device_array.h"

namespace tandem::engine::cuda {
namespace {

#define TANDEM_REQUIRE_CARDS(cards)                                        \
  do {                                                                     \
    int count_ = 0;                                                        \
    if (cudaGetDeviceCount(&count_) != cudaSuccess || count_ < (cards)) {  \
      GTEST_SKIP() << (cards) << " cards are needed, here are " << count_; \
    }                                                                      \
  } while (false)

// The part of a rank: sums depend on the order of ranks.
float PartOf(int rank, int64_t i, int round) {
  const float small = static_cast<float>((i * 7 + round * 13 + rank) % 101);
  return rank == 0 ? 1e8f + small : rank == 1 ? -1e8f : small / 3;
}

float SumOf(int ranks, int64_t i, int round) {
  float sum = PartOf(0, i, round);
  for (int rank = 1; rank < ranks; ++rank) sum += PartOf(rank, i, round);
  return sum;
}

std::vector<float> PartsOf(int rank, int64_t count, int round) {
  std::vector<float> parts;
  for (int64_t i = 0; i < count; ++i) parts.push_back(PartOf(rank, i, round));
  return parts;
}

void ExpectSum(const std::vector<float>& got, int ranks, int64_t count, int round) {
  size_t wrong = 0;
  for (int64_t i = 0; i < count; ++i)
    wrong += got[static_cast<size_t>(i)] != SumOf(ranks, i, round);
  EXPECT_EQ(wrong, 0u) << "of " << count << " in round " << round;
}

// Ranks on the first card, each with a stream.
class OneCard {
 public:
  OneCard(int ranks, int64_t most) : ranks_(ranks) {
    TANDEM_CUDA_CHECK(
        cudaHostAlloc(reinterpret_cast<void**>(&broken_), sizeof(SumBreak), cudaHostAllocPortable));
    *broken_ = {};
    for (int rank = 0; rank < ranks; ++rank) {
      mailboxes_.emplace_back(RankMailbox::Bytes(ranks));
      mailboxes_.back().Zero();
      values_.emplace_back(static_cast<size_t>(most));
      parts_.emplace_back(static_cast<size_t>(most));
      parts_.back().Zero();
      cudaStream_t stream = nullptr;
      TANDEM_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      streams_.push_back(stream);
    }
    TANDEM_CUDA_CHECK(cudaDeviceSynchronize());
  }
  ~OneCard() {
    for (const cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    cudaFreeHost(broken_);
  }

  float* part(int rank) {
    const auto i = static_cast<size_t>(rank);
    return rank == 0 ? values_[i].get() : parts_[i].get();
  }
  void SetParts(int64_t count, int round) {
    for (int rank = 0; rank < ranks_; ++rank) {
      const std::vector<float> parts = PartsOf(rank, count, round);
      TANDEM_CUDA_CHECK(cudaMemcpy(part(rank), parts.data(), parts.size() * sizeof(float),
                                   cudaMemcpyHostToDevice));
    }
    Synchronize();  // the last of it may still be on its way, which other streams do not wait for
  }
  void Sum(int rank, int64_t count, bool one_shot) {
    RankSumArgs args;
    for (int r = 0; r < ranks_; ++r) {
      args.mailboxes[r] = reinterpret_cast<RankMailbox*>(mailboxes_[static_cast<size_t>(r)].get());
    }
    args.broken = broken_;
    args.place = {part(rank), values_[static_cast<size_t>(rank)].get()};
    args.count = count;
    args.rank = rank;
    args.ranks = ranks_;
    TANDEM_CUDA_CHECK((one_shot ? OneShotSum : SumInPlace)(args, {.stream = stream(rank)}));
  }
  void Synchronize() { TANDEM_CUDA_CHECK(cudaDeviceSynchronize()); }
  void Check(int64_t count, int round) {
    EXPECT_EQ(broken_->why, 0u);
    for (int rank = 0; rank < ranks_; ++rank) {
      SCOPED_TRACE(rank);
      ExpectSum(values_[static_cast<size_t>(rank)].ToHost(), ranks_, count, round);
      if (rank == 0) continue;
      const std::vector<float> left = parts_[static_cast<size_t>(rank)].ToHost();
      EXPECT_EQ(std::count(left.begin(), left.end(), 0.0f), std::ssize(left));
    }
  }
  cudaStream_t stream(int rank) const { return streams_[static_cast<size_t>(rank)]; }
  SumBreak* broken() { return broken_; }

 private:
  const int ranks_;
  SumBreak* broken_ = nullptr;
  std::vector<DeviceArray<std::byte>> mailboxes_;
  std::vector<DeviceArray<float>> values_, parts_;
  std::vector<cudaStream_t> streams_;
};

class RankSum : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { TANDEM_REQUIRE_CARDS(1); }
};

TEST_P(RankSum, AddsInTheOrderOfRanks) {
  const int ranks = GetParam();
  constexpr int64_t kMost = 1 << 20;
  OneCard card(ranks, kMost);
  int round = 0;
  // Sums of either kind, of many sizes, one behind the other: a block's meetings are of both.
  for (const int64_t count : {int64_t{1}, int64_t{3}, int64_t{3584}, int64_t{3585}, int64_t{57344},
                              int64_t{130001}, int64_t{kOneShotFloats}, kMost}) {
    for (const bool one_shot : {true, false, true}) {
      if (one_shot && count > static_cast<int64_t>(kOneShotFloats)) continue;
      ++round;
      card.SetParts(count, round);
      for (int rank = 0; rank < ranks; ++rank) card.Sum((rank + round) % ranks, count, one_shot);
      card.Synchronize();
      SCOPED_TRACE(count);
      card.Check(count, round);
    }
  }
}

TEST_P(RankSum, CanBeRecordedAndPlayedAgain) {
  const int ranks = GetParam();
  constexpr int64_t kCount = 3584, kMost = 1 << 17;
  OneCard card(ranks, kMost);
  // Three sums: what epochs a graph has differs from one playing to the next.
  std::vector<cudaGraphExec_t> graphs;
  for (int rank = 0; rank < ranks; ++rank) {
    const cudaStream_t stream = card.stream(rank);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    TANDEM_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    // Sums of zeros behind the first, but for rank 0, whose part is what it has.
    for (int i = 0; i < 3; ++i) card.Sum(rank, i == 1 ? kMost : kCount, i != 1);
    TANDEM_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    TANDEM_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0));
    TANDEM_CUDA_CHECK(cudaGraphDestroy(graph));
    TANDEM_CUDA_CHECK(cudaGraphUpload(exec, stream));
    graphs.push_back(exec);
  }
  card.Synchronize();
  for (int round = 0; round < 200; ++round) {
    card.SetParts(kCount, round);
    for (int rank = 0; rank < ranks; ++rank) {
      const int turn = (rank + round) % ranks;
      TANDEM_CUDA_CHECK(cudaGraphLaunch(graphs[static_cast<size_t>(turn)], card.stream(turn)));
    }
    card.Synchronize();
    card.Check(kCount, round);
    if (HasFailure()) break;
  }
  for (const cudaGraphExec_t exec : graphs) cudaGraphExecDestroy(exec);
}

TEST_P(RankSum, NobodyWaitsOnceItIsAborted) {
  OneCard card(GetParam(), 1 << 17);
  for (const bool one_shot : {true, false}) card.Sum(0, 1 << 17, one_shot);
  __atomic_store_n(&card.broken()->why, SumBreak::kAborted, __ATOMIC_RELEASE);
  card.Synchronize();
}

INSTANTIATE_TEST_SUITE_P(Of, RankSum, ::testing::Values(2, 4));

void OnThreads(int ranks, const std::function<void(int rank)>& work) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) threads.emplace_back(work, rank);
  for (std::thread& thread : threads) thread.join();
}

// Sums of ranks on threads of their own, each on the device named.
void CheckRanks(const std::vector<int>& ordinals, bool recorded) {
  const int size = static_cast<int>(ordinals.size());
  std::vector<std::unique_ptr<CudaDevice>> opened;
  std::vector<CudaDevice*> devices;
  for (const int ordinal : ordinals) {
    auto device = CudaDevice::Open(ordinal);
    ASSERT_TRUE(device.ok()) << device.status();
    opened.push_back(*std::move(device));
    devices.push_back(opened.back().get());
  }
  const auto ranks = MakeCudaRanks(devices);
  if (absl::IsFailedPrecondition(ranks.status())) GTEST_SKIP() << ranks.status();
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  EXPECT_EQ((*ranks)->at(0)->recordable(), recorded);
  constexpr int64_t kMost = 1 << 20;
  std::vector<std::vector<std::vector<float>>> got(ordinals.size());  // by rank and round
  const std::vector<int64_t> counts = {5, 3584, 100000, kMost, 3584, 7168};
  OnThreads(size, [&](int rank) {
    const auto i = static_cast<size_t>(rank);
    Collective* collective = (*ranks)->at(rank);
    ASSERT_TRUE(collective->Prepare(devices[i], kMost).ok());
    const std::unique_ptr<Stream> stream = devices[i]->NewStream();
    auto values = devices[i]->Allocate(kMost * sizeof(float));
    ASSERT_TRUE(values.ok());
    for (int round = 0; round < 24; ++round) {
      const int64_t count = counts[static_cast<size_t>(round) % counts.size()];
      const std::vector<float> part = PartsOf(rank, count, round);
      const size_t bytes = part.size() * sizeof(float);
      const auto sum = [&] {
        float* to = collective->BeginSum(values->as<float>(), part.size(), stream.get());
        stream->CopyToDevice(to, part.data(), bytes);
        stream->Synchronize();
        if (!collective->recordable()) {
          collective->EndSum(values->as<float>(), part.size(), stream.get());
          return;
        }
        const std::unique_ptr<Graph> graph = stream->Capture(
            [&] { collective->EndSum(values->as<float>(), part.size(), stream.get()); });
        collective->Meet();
        stream->Launch(graph.get());
        stream->Synchronize();
      };
      sum();
      got[i].emplace_back(part.size());
      stream->CopyToHost(got[i].back().data(), values->data(), bytes);
      stream->Synchronize();
    }
    collective->Meet();
  });
  EXPECT_TRUE((*ranks)->status().ok());
  for (const auto& of_rank : got) {
    ASSERT_EQ(of_rank.size(), 24u);
    for (int round = 0; round < 24; ++round) {
      const std::vector<float>& values = of_rank[static_cast<size_t>(round)];
      ExpectSum(values, size, std::ssize(values), round);
    }
  }
}

TEST(CudaRanksTest, AddUpOnOneCard) {
  TANDEM_REQUIRE_CARDS(1);
  CheckRanks({0, 0}, false);
  CheckRanks({0, 0, 0, 0}, false);
}

TEST(CudaRanksTest, AddUpOnCardsOfTheirOwn) {
  TANDEM_REQUIRE_CARDS(2);
  CheckRanks({0, 1}, true);
}

TEST(CudaRanksTest, AddUpWhereSomeShareACard) {
  TANDEM_REQUIRE_CARDS(2);
  CheckRanks({0, 1, 0, 1}, false);
}

// For the log: recorded sums of the rows of a decode step, 3,584 wide, one behind the other.
TEST(CudaRanksTest, SaysWhatASumTakes) {
  TANDEM_REQUIRE_CARDS(2);
  auto first = CudaDevice::Open(0), second = CudaDevice::Open(1);
  ASSERT_TRUE(first.ok() && second.ok());
  std::vector<CudaDevice*> devices = {first->get(), second->get()};
  const auto ranks = MakeCudaRanks(devices);
  if (absl::IsFailedPrecondition(ranks.status())) GTEST_SKIP() << ranks.status();
  ASSERT_TRUE(ranks.ok()) << ranks.status();
  constexpr size_t kMost = size_t{4096} * 3584;
  OnThreads(2, [&](int rank) {
    const auto i = static_cast<size_t>(rank);
    Collective* collective = (*ranks)->at(rank);
    ASSERT_TRUE(collective->Prepare(devices[i], kMost).ok());
    const std::unique_ptr<Stream> stream = devices[i]->NewStream();
    auto values = devices[i]->Allocate(kMost * sizeof(float));
    ASSERT_TRUE(values.ok());
    for (const size_t rows : {1, 8, 64, 256, 4096}) {
      constexpr int kSums = 100;
      const std::unique_ptr<Graph> graph = stream->Capture([&] {
        for (int sum = 0; sum < kSums; ++sum) {
          collective->BeginSum(values->as<float>(), rows * 3584, stream.get());
          collective->EndSum(values->as<float>(), rows * 3584, stream.get());
        }
      });
      double best = 1e9;
      for (int repeat = 0; repeat < 5; ++repeat) {
        collective->Meet();
        const auto begin = std::chrono::steady_clock::now();
        stream->Launch(graph.get());
        stream->Synchronize();
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
        best = std::min(best, taken.count());
      }
      collective->Meet();
      if (rank == 0) std::printf("sum of %zu rows: %.2f us\n", rows, best / kSums * 1e6);
    }
  });
  EXPECT_TRUE((*ranks)->status().ok());
}

TEST(CudaRanksTest, ARankThatFailsIsNotWaitedFor) {
  TANDEM_REQUIRE_CARDS(1);
  auto device = CudaDevice::Open(0), other = CudaDevice::Open(0);
  ASSERT_TRUE(device.ok() && other.ok());
  std::vector<CudaDevice*> devices = {device->get(), other->get()};
  const auto ranks = MakeCudaRanks(devices);
  ASSERT_TRUE(ranks.ok());
  OnThreads(2, [&](int rank) {
    if (rank == 1) return (*ranks)->Abort();
    EXPECT_TRUE(absl::IsAborted((*ranks)->at(0)->Prepare(devices[0], 1024)));
  });
}

}  // namespace
}  // namespace tandem::engine::cuda
