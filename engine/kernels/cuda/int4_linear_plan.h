// How a product of int4_linear.h is cut, and its launch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "engine/kernels/cuda/int4_linear_kernel.cuh"
#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

// Shared memory that a thread block takes where the device has it, in bytes.
inline constexpr int kInt4LeastShared = 104 << 10;

// What is compared are the bytes that the busiest thread block reads: its weights, and the
// activations beside them once for each of its row blocks.
template <class Tile>
Int4Plan PlanInt4(const Int4Matrix& matrix, const LaunchOptions& options) {
  const int multiprocessors = options.multiprocessors, least = CeilDiv(matrix.tiles, Tile::kTiles);
  const int rounds = CeilDiv(least, multiprocessors);
  Int4Plan best;
  best.row_blocks = std::min(matrix.tiles, multiprocessors * rounds);
  best.grid = std::min(multiprocessors, best.row_blocks);
  if (!Tile::kCut || rounds > 1) return best;
  const auto bytes_of = [&](int row_blocks, int parts) {
    return CeilDiv(matrix.blocks, parts) *
           (CeilDiv(matrix.tiles, row_blocks) * matrix.height + 2 * Tile::kXRows);
  };
  int64_t fewest = bytes_of(best.row_blocks, 1);
  for (int row_blocks = least; row_blocks <= multiprocessors / 2; ++row_blocks) {
    const int parts = std::min({multiprocessors / row_blocks, matrix.blocks, kMostInt4Parts});
    if (parts < 2 || 2 * row_blocks > kInt4Counters) continue;
    const int64_t bytes = bytes_of(row_blocks, parts);
    if (bytes >= fewest) continue;
    fewest = bytes;
    best = {row_blocks, parts, row_blocks * parts};
  }
  return best;
}

template <class Tile, class Op>
cudaError_t LaunchInt4(const Op& op, const Int4Matrix& matrix, const Int4Plan& plan,
                       const Int4Scratch& scratch, const LaunchOptions& options) {
  auto kernel = Int4LinearKernel<Tile, Op>;
  // A kernel that starts beside its predecessor must not find room for two of its thread blocks on
  // one multiprocessor, and none on another: whoever comes after would keep that for the rest of
  // the step.
  const int shared_bytes =
      std::min(std::max(Tile::kSharedBytes, kInt4LeastShared), options.shared_bytes);
  static std::atomic<int> allowed = 0;
  if (allowed < shared_bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    allowed = shared_bytes;
  }
  // Kernels whose thread blocks wait for each other are slower beside another.
  LaunchOptions launch = options;
  launch.overlap = options.overlap && !Tile::kCut;
  return Launch(kernel, dim3(static_cast<unsigned>(plan.grid)), Tile::kThreads,
                static_cast<size_t>(shared_bytes), launch, op, matrix, plan, scratch);
}

}  // namespace tandem::engine::cuda
