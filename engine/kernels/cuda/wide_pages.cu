#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/item_of_row.cuh"
#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/wide_pages.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 16;  // elements that a thread reads together

// One warp: a step has few items, and this comes once a step.
__global__ __launch_bounds__(32) void NumberWideBlocksKernel(const __grid_constant__ WideRuns runs,
                                                             int32_t* first_wide_blocks) {
  WaitForPredecessor();
  const int lane = static_cast<int>(threadIdx.x);
  int before = 0;
  for (int base = 0; base < runs.num_items; base += 32) {
    const int item = base + lane;
    int sum = item < runs.num_items ? WideBlocksOf(runs, item) : 0;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int left = __shfl_up_sync(~0u, sum, lanes);
      if (lane >= lanes) sum += left;
    }
    if (item < runs.num_items) first_wide_blocks[item + 1] = before + sum;
    before += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) first_wide_blocks[0] = 0;
}

// One thread block per wide block.
__global__ __launch_bounds__(kThreads) void WidenPagesKernel(
    const __grid_constant__ WidenPagesArgs a) {
  const int wide = static_cast<int>(blockIdx.x);
  const int item = ItemOfRow(a.first_wide_blocks, a.num_items, wide);
  const int64_t block = a.blocks[a.first_blocks[item] + wide - a.first_wide_blocks[item]];
  const auto* from =
      reinterpret_cast<const uint4*>(static_cast<const uint8_t*>(a.kv) + block * a.block_elements);
  auto* to = reinterpret_cast<uint4*>(a.wide + static_cast<int64_t>(wide) * a.block_elements);
  WaitForPredecessor();
  LetSuccessorStart();
  for (int i = static_cast<int>(threadIdx.x); i < a.block_elements / kAtOnce; i += kThreads) {
    const uint4 numbers = __ldcg(from + i);
    const uint32_t fours[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
    uint32_t pairs[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs[2 * j] = BFloat16sOf(static_cast<uint16_t>(fours[j]));
      pairs[2 * j + 1] = BFloat16sOf(static_cast<uint16_t>(fours[j] >> 16));
    }
    to[2 * i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    to[2 * i + 1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
  }
}

}  // namespace

cudaError_t NumberWideBlocks(const WideRuns& runs, int32_t* first_wide_blocks,
                             const LaunchOptions& options) {
  return Launch(NumberWideBlocksKernel, dim3(1), 32, 0, options, runs, first_wide_blocks);
}

cudaError_t WidenPages(const WidenPagesArgs& args, const LaunchOptions& options) {
  if (args.num_wide_blocks < 1 || args.block_elements % kAtOnce != 0) return cudaErrorInvalidValue;
  return Launch(WidenPagesKernel, dim3(static_cast<unsigned>(args.num_wide_blocks)), kThreads, 0,
                options, args);
}

}  // namespace tandem::engine::cuda
