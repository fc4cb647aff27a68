// Pages of e4m3 made bfloat16 in scratch memory, for kernels that read no others: those of the runs
// of a step, one run's behind the other's.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

// Runs of a batch as prefill_attention.h has them. Items of one row, and those that pad the step,
// have no wide pages.
struct WideRuns {
  const int32_t* first_rows = nullptr;  // [num_items + 1]
  const int32_t* starts = nullptr;      // [num_items]
  int num_items = 0, block_size = 0;
};

// How many blocks an item's positions take.
__host__ __device__ inline int WideBlocksOf(const WideRuns& runs, int item) {
  const int rows = runs.first_rows[item + 1] - runs.first_rows[item], start = runs.starts[item];
  return start < 0 || rows == 1 ? 0 : (start + rows - 1) / runs.block_size + 1;
}

// first_wide_blocks[i]: the wide blocks of the items before item i, [num_items + 1].
cudaError_t NumberWideBlocks(const WideRuns& runs, int32_t* first_wide_blocks,
                             const LaunchOptions& options);

struct WidenPagesArgs {
  const void* kv = nullptr;               // a layer's pages of e4m3
  const int32_t* first_blocks = nullptr;  // [num_items + 1], into `blocks`
  const int32_t* blocks = nullptr;
  const int32_t* first_wide_blocks = nullptr;  // [num_items + 1]
  __nv_bfloat16* wide = nullptr;               // out: blocks as those of a layer
  int num_items = 0, num_wide_blocks = 0;
  int block_elements = 0;  // keys and values of all heads; a multiple of 16
};
cudaError_t WidenPages(const WidenPagesArgs& args, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
