// What stands between the products of a forward pass, one kernel each: from token ids to the
// residual stream, norms, biases, rotation, the write of keys and values, the gated product.
// For every shape that the CPU engine loads; the fused products (linear_args.h) take these steps
// into their epilogues.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

// What a step needs before its first layer. Rows of items whose `starts` is -1 are padding: they
// take token 0 at position 0, and have no slot.
struct BeginStepArgs {
  const int32_t* token_ids = nullptr;     // [rows]; pending ones as ops.h says
  const int32_t* drawn = nullptr;         // of the step before; null: no id is pending
  const int32_t* positions = nullptr;     // [rows]
  const int32_t* first_rows = nullptr;    // [items + 1]
  const int32_t* starts = nullptr;        // [items]
  const int32_t* first_blocks = nullptr;  // [items + 1]
  const int32_t* blocks = nullptr;
  const void* embedding = nullptr;     // [vocab][hidden]
  const float* frequencies = nullptr;  // [head_dim / 2], radians per position
  const float* norm_weight = nullptr;  // [hidden], of the first layer; read where scaled is wanted
  float* residual = nullptr;           // out: [rows][hidden]
  __nv_bfloat16* scaled = nullptr;     // out: [rows][hidden], norm_weight * residual; or null
  float* squares = nullptr;            // out: [rows], sums of squares of the residual; or null
  float* cos = nullptr;                // out: [rows][head_dim / 2]
  float* sin = nullptr;                // out: [rows][head_dim / 2]
  int64_t* slots = nullptr;  // out: [rows]: element offset in a layer's pages of (position, K,
                             // head 0); -1: none
  int rows = 0, items = 0, hidden = 0, vocab = 0, kv_heads = 0, head_dim = 0, block_size = 0;
  int embedding_kind = 0;  // 0: float32, 1: bfloat16, 2: float16
  float rope_scale = 1;    // of cosines and sines
};
// Angles are rounded to float32 before their cosine is taken, as on the CPU and in Hugging Face
// transformers; the cosine itself is good to float32 at any position.
cudaError_t BeginStep(const BeginStepArgs& args, const LaunchOptions& options);

// out[i] = x[row_ids[i]] / sqrt(mean(x^2) + epsilon) * weight; without row_ids row i itself.
cudaError_t RmsNormRows(const float* x, const int32_t* row_ids, const float* weight, float epsilon,
                        int rows, int width, __nv_bfloat16* out, const LaunchOptions& options);

// What the fused products take instead of a norm (linear_args.h): scaled[i] = weight *
// x[row_ids[i]] in bfloat16 and the sum of squares of that row of x.
cudaError_t ScaleRows(const float* x, const int32_t* row_ids, const float* weight, int rows,
                      int width, __nv_bfloat16* scaled, float* squares,
                      const LaunchOptions& options);

// to[i] = from[row_ids[i]], rows of `row_bytes` bytes, an even number.
cudaError_t CopyRows(const void* from, const int32_t* row_ids, int rows, size_t row_bytes, void* to,
                     const LaunchOptions& options);

// Bias, norms of heads, rotation (element i pairs with i + head_dim / 2), and the write of keys and
// values to their pages [block][K|V][kv_head][block_size][head_dim].
struct FinishQkvArgs {
  const float* qkv = nullptr;     // [rows][(heads + 2 * kv_heads) * head_dim]
  const float* bias = nullptr;    // [(heads + 2 * kv_heads) * head_dim] or null
  const float* q_norm = nullptr;  // [head_dim] or null
  const float* k_norm = nullptr;
  float epsilon = 0;
  const float* cos = nullptr;  // of BeginStep, as the next three
  const float* sin = nullptr;
  const int64_t* slots = nullptr;
  __nv_bfloat16* q = nullptr;  // out: [rows][heads][head_dim]
  void* kv = nullptr;          // this layer's pages
  int rows = 0, heads = 0, kv_heads = 0, head_dim = 0, block_size = 0;  // head_dim even, <= 256
  bool fp8_kv = false;  // pages are of e4m3; else of bfloat16
};
cudaError_t FinishQkv(const FinishQkvArgs& args, const LaunchOptions& options);

// out = silu(gate) * up, of gate_up + bias, which is [rows][inner | inner].
cudaError_t SiluMulRows(const float* gate_up, const float* bias, int rows, int inner,
                        __nv_bfloat16* out, const LaunchOptions& options);

// x[row] += bias.
cudaError_t AddBiasRows(float* x, const float* bias, int rows, int width,
                        const LaunchOptions& options);

}  // namespace tandem::engine::cuda
