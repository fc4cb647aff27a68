// The ends of a step: from token ids to the residual stream, and from logits to token ids.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

// Everything that a step needs before its first layer: one new position per row, any number of
// rows. The arrays of the batch are those of engine/kernels/ops.h, in memory of the device.
struct PrepareStepArgs {
  const int32_t* token_ids = nullptr;     // [rows], below the vocabulary or pending: see ResolveId
  const int32_t* positions = nullptr;     // [rows]
  const int32_t* first_rows = nullptr;    // [items + 1]
  const int32_t* starts = nullptr;        // [items]; -1: the item pads the step
  const int32_t* first_blocks = nullptr;  // [items + 1]
  const int32_t* blocks = nullptr;
  const int32_t* drawn = nullptr;            // tokens of the step before; null: no id is pending
  const __nv_bfloat16* embedding = nullptr;  // [vocab][hidden]
  const float* norm_weight = nullptr;        // [hidden], of the first layer
  const float* frequencies = nullptr;        // [head_dim / 2], radians per position
  // Out. Rows of padding items get zeros.
  float* residual = nullptr;           // [rows][hidden]
  __nv_bfloat16* scaled = nullptr;     // [rows][hidden], norm_weight * residual
  float* square_shares = nullptr;      // [rows], one share of SquareSums; null: not wanted
  float* cos = nullptr;                // [rows][head_dim / 2]
  float* sin = nullptr;                // [rows][head_dim / 2]
  int64_t* slots = nullptr;            // [rows], see QkvArgs; -1 for rows of padding items
  DecodeItem* decode_items = nullptr;  // [items + 1], see DecodeAttentionArgs; null: not wanted
  int rows = 0, items = 0, hidden = 0, kv_heads = 0, head_dim = 0, block_size = 0;
  float rope_scale = 1;  // YaRN's attention factor
};
cudaError_t PrepareStep(const PrepareStepArgs& args, const LaunchOptions& options);

// tokens[row] = the token with the largest logit, the lowest id among equals; -1 if a logit is NaN.
// best: [parts][kMaxSkinnyRows] as SkinnyLogits leaves them.
cudaError_t SelectGreedy(const uint64_t* best, int parts, int rows, int32_t* tokens,
                         const LaunchOptions& options);

}  // namespace tandem::engine::cuda
