// Attention of one query position per sequence over paged keys and values: the decode step's.
//
// The 8 or fewer query heads that share a KV head are the N side of the tensor core's products, so
// that keys and values are read once. The work is cut in tiles of 16 positions, dealt evenly to the
// thread blocks in the order (sequence, KV head, position), whatever the lengths are: one sequence
// of 128k tokens fills the device as well as 256 of 2k. A (sequence, KV head) that is shared by
// several thread blocks is merged by the last of them to finish, in the order of positions.
//
// Each warp streams its own tiles through its own ring and keeps a running maximum (Milakov and
// Gimelshein, 2018, arXiv:1805.02867); there is no barrier between tiles.
//
// Order of summation: fixed by the lengths of all sequences of the batch and the number of
// multiprocessors, so the last bits of a sequence's result depend on the batch it is in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

inline constexpr int kMaxDecodeRows = 512;
inline constexpr int kAttentionTile = 16;  // positions

struct DecodeAttentionArgs {
  const __nv_bfloat16* q = nullptr;       // [rows][heads][head_dim]
  const __nv_bfloat16* kv = nullptr;      // pages [block][K|V][kv_head][block_size][head_dim]
  const int32_t* block_tables = nullptr;  // [rows] at block_table_stride
  const int32_t* lengths = nullptr;       // [rows]: positions to attend, the query's own included
  // [rows + 1]: prefix sums of ceil(length / kAttentionTile); written by PrepareStep.
  const int32_t* tile_starts = nullptr;
  __nv_bfloat16* out = nullptr;                         // [rows][heads][head_dim]
  int rows = 0, heads = 0, kv_heads = 0, head_dim = 0;  // heads / kv_heads <= 8; head_dim 64, 128
  int block_size = 0;                                   // a multiple of kAttentionTile
  int block_table_stride = 0;
  float scale = 0;  // of the scores
};

struct DecodeAttentionScratch {
  float* partial = nullptr;      // DecodeAttentionPartialFloats() elements
  uint32_t* counters = nullptr;  // [rows * kv_heads]; zeros before and after
};
size_t DecodeAttentionPartialFloats(int head_dim, int multiprocessors);

// Lengths and block tables must be complete before the direct predecessor in the stream starts, and
// that may write the last position of each sequence, but no earlier one: earlier pages are fetched
// before it has finished.
cudaError_t DecodeAttention(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                            const LaunchOptions& options);

}  // namespace tandem::engine::cuda
