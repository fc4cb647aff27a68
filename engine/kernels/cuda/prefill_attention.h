// Causal attention of runs of consecutive query rows over paged keys and values: the prefill
// step's.
//
// A batch is a list of items; item i is the query rows [first_rows[i], first_rows[i + 1]), at the
// positions starts[i], starts[i] + 1, ... of a sequence whose pages are blocks[first_blocks[i]],
// blocks[first_blocks[i] + 1], ..., in the order of positions. Row r of the run attends to the
// positions 0 .. starts[i] + r, all of which must lie in the pages: keys and values of the run were
// written before. Query head h reads KV head h / (heads / kv_heads).
//
//   out[row][h] = sum_p softmax_p(scale * q[row][h] . k[p]) v[p]
//
// Pages hold anything, NaN included, behind the sequence's end; the kernels keep it out of the
// results. The arrays of the batch lie in memory of the device; the kernel's predecessor in the
// stream may write q and pages, but not them. An item with starts[i] < 0 is padding: its rows are
// neither read nor written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

struct PrefillAttentionArgs {
  const __nv_bfloat16* q = nullptr;     // [rows][heads][head_dim], 16-byte aligned
  const void* kv = nullptr;             // this layer's [block][K|V][kv_head][block_size][head_dim]
  const int32_t* first_rows = nullptr;  // [num_items + 1]
  const int32_t* starts = nullptr;      // [num_items]
  const int32_t* first_blocks = nullptr;  // [num_items + 1], into `blocks`
  const int32_t* blocks = nullptr;
  __nv_bfloat16* out = nullptr;  // [rows][heads][head_dim], 16-byte aligned
  // Scratch, PrefillAttentionPartialFloats() elements: with it, positions are split between thread
  // blocks where units of rows do not fill the device. Null: never.
  float* partial = nullptr;
  uint32_t* flags =
      nullptr;  // [PrefillAttentionFlags()]; zeros before and after; null: fewer splits
  // A row's result is the same whatever the batch and the cut into chunks are: positions are split
  // at fixed ones only. HopperPrefillAttention then needs `partial`.
  bool batch_invariant = false;
  int num_items = 0, rows = 0;  // padding included
  // Bounds that the batch keeps, for the size of the launch: rows of the longest run, positions of
  // the longest sequence.
  int max_item_rows = 0, max_length = 0;
  int heads = 0, kv_heads = 0, head_dim = 0;
  int block_size = 0;             // a multiple of 16
  int num_pool_blocks = 0;        // of the layer
  bool skip_single_rows = false;  // items of one row are left to the decode kernel
  float scale = 0;                // of the scores
  bool fp8_kv = false;            // pages are of e4m3; else of bfloat16
};

// How many floats `partial` has room for.
size_t PrefillAttentionPartialFloats(int head_dim, int multiprocessors);
size_t PrefillAttentionFlags(int multiprocessors);

// sm_90a only: head_dim 64 or 128, any number of heads per KV head, pages of bfloat16.
// cudaErrorNotSupported for other shapes and devices: nothing is launched then.
//
// Order of summation: positions in tiles of a fixed size, counted from position 0, from a row's own
// position downwards. With `batch_invariant`, and also without `partial`, nothing else enters a
// row's result: neither the other items nor where its chunk begins. The two differ.
cudaError_t HopperPrefillAttention(const PrefillAttentionArgs& args, const LaunchOptions& options);

// sm_80 and newer, FlashInfer's FA2 kernels.
cudaError_t FlashPrefillAttention(const PrefillAttentionArgs& args, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
