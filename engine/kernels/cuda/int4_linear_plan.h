// How a product of int4_linear.h is cut, and its launch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/kernels/cuda/int4_linear_kernel.cuh"
#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

// Shared memory that a thread block takes where the device has it, in bytes. One that starts beside
// its predecessor must find room for itself on every multiprocessor, and for no second one of its
// launch, or some multiprocessors do the work of two and others none. Where K is cut the
// predecessor's thread blocks end at different times: there two of a launch never fit.
template <class Tile>
constexpr int kInt4LeastShared = Tile::kCut ? 118 << 10 : 104 << 10;

// The most that Tile::kPartialFloats may be, of whichever tile.
inline constexpr int kMostInt4PartialFloats = kMaxInt4Rows * 16 * 20;

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
    return Tile::kHalves * CeilDiv(2 / Tile::kHalves * matrix.blocks, parts) *
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
  const int shared_bytes =
      std::min(std::max(Tile::kSharedBytes, kInt4LeastShared<Tile>), options.shared_bytes);
  static_assert(Tile::kPartialFloats <= kMostInt4PartialFloats);
  const cudaError_t refused =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (refused != cudaSuccess) return refused;
  return Launch(kernel, dim3(static_cast<unsigned>(plan.grid)), Tile::kThreads,
                static_cast<size_t>(shared_bytes), options, op, matrix, plan, scratch);
}

}  // namespace tandem::engine::cuda
