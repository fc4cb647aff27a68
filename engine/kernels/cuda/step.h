// The ends of a decode step: from token ids to the residual stream, and from logits to token ids.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

// Everything a decode step needs before its first layer, for one new position per row.
struct PrepareStepArgs {
  const int32_t* tokens = nullptr;           // [rows], each below the vocabulary
  const int32_t* lengths = nullptr;          // [rows]: positions, the new one included
  const int32_t* block_tables = nullptr;     // [rows] at block_table_stride
  const __nv_bfloat16* embedding = nullptr;  // [vocab][hidden]
  const float* norm_weight = nullptr;        // [hidden], of the first layer
  const float* frequencies = nullptr;        // [head_dim / 2], radians per position
  float* residual = nullptr;                 // out: [rows][hidden]
  __nv_bfloat16* scaled = nullptr;           // out: [rows][hidden], norm_weight * residual
  float* square_shares = nullptr;            // out: one share, see SquareSums; null: not wanted
  float* cos = nullptr;                      // out: [rows][head_dim / 2]
  float* sin = nullptr;                      // out: [rows][head_dim / 2]
  int64_t* slots = nullptr;                  // out: [rows], see QkvArgs
  int32_t* tile_starts = nullptr;            // out: [rows + 1], see DecodeAttentionArgs
  int rows = 0, hidden = 0, kv_heads = 0, head_dim = 0, block_size = 0, block_table_stride = 0;
  float rope_scale = 1;  // YaRN's attention factor
};
cudaError_t PrepareStep(const PrepareStepArgs& args, const LaunchOptions& options);

// tokens[row] = the token with the largest logit, the lowest id among equals; -1 if a logit is NaN.
// best: [parts][kMaxSkinnyRows] as SkinnyLogits leaves them.
cudaError_t SelectGreedy(const uint64_t* best, int parts, int rows, int32_t* tokens,
                         const LaunchOptions& options);

}  // namespace tandem::engine::cuda
