// Attention of one query position per sequence over paged keys and values: the decode step's. Rows
// of longer runs in the same step are left to another kernel.
//
// The 8 or fewer query heads that share a KV head are the N side of the tensor core's products, so
// that keys and values are read once. The work is cut in tiles of 16 positions, dealt evenly to the
// thread blocks in the order (sequence, KV head, position), whatever the lengths are: one sequence
// of 128k tokens fills the device as well as 256 of 2k. A few sequences of about the same length
// have thread blocks of their own, which share nothing with another's. Where several thread blocks
// share a (sequence, KV head), each stores its part and merges a share of the columns of all parts,
// in the order of positions, as they come: thread blocks of a launch wait for each other, so all of
// them must be able to run at the same time.
//
// Each warp streams its own tiles through its own ring with a running softmax (Milakov and
// Gimelshein, 2018, arXiv:1805.02867), whose base follows the maximum only where that has left it
// behind by 2^8; there is no barrier between tiles.
//
// Pages of e4m3 are made halves, not bfloat16, on the way from shared memory to the tensor core:
// that is one instruction for two numbers. Queries are brought to the range of halves, exactly but
// for elements below a 2^-28th of their head's largest.
//
// Order of summation: fixed by the lengths of all sequences of the batch and the number of
// multiprocessors, so the last bits of a sequence's result depend on the batch it is in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/turns.h"

namespace tandem::engine::cuda {

inline constexpr int kMaxDecodeItems = 512;
inline constexpr int kAttentionTile = 16;  // positions

// One item of a step as the attention sees it; written by PrepareStep. Items of several rows, and
// those that pad a step, have no tiles: they are another kernel's or nobody's.
struct alignas(16) DecodeItem {
  int32_t first_tile;   // tiles of the items before
  int32_t length;       // positions to attend, the query's own included; 0: none
  int32_t first_block;  // into `blocks`
  int32_t row;
};

struct DecodeAttentionArgs {
  const __nv_bfloat16* q = nullptr;   // [rows][heads][head_dim]
  const void* kv = nullptr;           // pages [block][K|V][kv_head][block_size][head_dim]
  const DecodeItem* items = nullptr;  // [num_items + 1]; the last has the number of all tiles
  const int32_t* blocks = nullptr;    // the items' pool blocks, in the order of positions
  __nv_bfloat16* out = nullptr;       // [rows][heads][head_dim]; rows of no item stay as they are
  int num_items = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int block_size = 0;
  float scale = 0;      // of the scores
  bool fp8_kv = false;  // pages are of e4m3; else of bfloat16
};

// Memory that the launches of one stream share, for one head_dim and number of multiprocessors;
// zeros at first.
struct DecodeAttentionScratch {
  uint64_t* parts = nullptr;     // DecodeAttentionParts() elements
  uint32_t* launches = nullptr;  // [multiprocessors]
  uint32_t* turns = nullptr;     // [kTurns]
};
size_t DecodeAttentionParts(int head_dim, int multiprocessors);

// head_dim 64 or 128, at most 8 query heads per KV head, at most kMaxDecodeItems items, block_size
// a multiple of kAttentionTile, and a device whose shared memory holds the rings.
bool SupportsDecodeAttention(int num_items, int heads, int kv_heads, int head_dim, int block_size,
                             const LaunchOptions& options);

// Items and blocks must be complete before the direct predecessor in the stream starts, and that
// may write the last position of each sequence, but no earlier one: earlier pages are fetched
// before it has finished.
cudaError_t DecodeAttention(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                            const LaunchOptions& options);

}  // namespace tandem::engine::cuda
