// A KV pool in a card's memory that other processes can map, for tests of the transports of cards.
#pragma once

#include <cuda_runtime.h>
#include <vector>

#include "gtest/gtest.h"

#include "engine/device/cuda/cuda_memory.h"
#include "tests/support/paths.h"
#include "tests/unit/kvtransfer/endpoint_fixture.h"

namespace tandem::kvtransfer {

// With the bytes of a TestPool.
class CardPool {
 public:
  explicit CardPool(const TestPool& host, int card = 0) : region_(host.region()) {
    EXPECT_EQ(cudaSetDevice(card), cudaSuccess);
    EXPECT_EQ(cudaFree(nullptr), cudaSuccess);  // a context
    auto buffer = engine::cuda::AllocateExportable(card, region_.TotalBytes());
    EXPECT_OK(buffer.status());
    buffer_ = *std::move(buffer);
    region_.base = buffer_.as<std::byte>();
    region_.fd = buffer_.fd();
    region_.memory = KvMemoryKind::kDevice;
    Set(host);
  }

  const KvRegion& region() const { return region_; }
  void Set(const TestPool& host) {
    EXPECT_EQ(cudaMemcpy(region_.base, host.region().base, region_.TotalBytes(), cudaMemcpyDefault),
              cudaSuccess);
  }
  void Fill(std::byte value) {
    EXPECT_EQ(cudaMemset(region_.base, static_cast<int>(value), region_.TotalBytes()), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  void CopyTo(TestPool* host) const {
    EXPECT_EQ(
        cudaMemcpy(host->region().base, region_.base, region_.TotalBytes(), cudaMemcpyDefault),
        cudaSuccess);
  }

 private:
  engine::Buffer buffer_;
  KvRegion region_;
};

// The layout that a test and its writer know by number.
inline KvLayout IpcLayout(int number) {
  constexpr KvLayout kLayouts[] = {
      {28, 4, 128, 16, DType::kBFloat16},  // Qwen2.5-7B
      {3, 2, 8, 16, DType::kBFloat16},    {2, 3, 24, 16, DType::kBFloat16},
      {2, 1, 64, 32, DType::kFloat32},    {2, 8, 128, 256, DType::kBFloat16},
      {2, 5, 40, 16, DType::kFloat32},    {60, 1, 8, 16, DType::kBFloat16},
  };
  return kLayouts[number];
}
inline constexpr int kNumIpcLayouts = 7;

}  // namespace tandem::kvtransfer
