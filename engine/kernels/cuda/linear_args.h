// What the linear layers of a decoder are asked for, whichever kernel answers: skinny_linear.h for
// few rows, hopper_linear.h for more of them on sm_90a. Row-major matrices, dense unless a stride
// is given; weights are [outputs][inputs] in bfloat16, as checkpoints have them.
//
// RMS normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467) has no pass of its own. With the
// residual stream h and norm weight g, x = h * g / rms(h): the producer of h also writes g * h in
// bfloat16 and its share of the sum of h^2; the consumer multiplies g * h by its weights and
// divides by rms(h) in its epilogue.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

namespace tandem::engine::cuda {

// Sums of squares of the residual stream, in shares that are added in order.
struct SquareSums {
  const float* shares = nullptr;  // [parts][stride], a row's share at its number
  int parts = 0;
  int stride = 0;  // at least the number of rows
};

// The first half of the feed-forward block: silu(gate) * up.
struct GateUpArgs {
  const __nv_bfloat16* weight = nullptr;  // [2 * inner][inputs], gate rows first
  const __nv_bfloat16* x = nullptr;       // [rows][inputs]: norm weight * residual stream
  __nv_bfloat16* out = nullptr;           // [rows][inner]
  int rows = 0, inner = 0, inputs = 0;
  SquareSums squares;  // of the residual stream
  float epsilon = 0;
};

// Query, key and value projections with bias, rotary embedding (element i pairs with i +
// head_dim / 2), and the write of keys and values into their pages.
struct QkvArgs {
  const __nv_bfloat16* weight = nullptr;  // [(heads + 2 * kv_heads) * head_dim][inputs]
  const float* bias = nullptr;            // [(heads + 2 * kv_heads) * head_dim] or null
  const __nv_bfloat16* x = nullptr;       // [rows][inputs]: norm weight * residual stream
  __nv_bfloat16* q = nullptr;             // out: [rows][heads][head_dim]
  void* kv = nullptr;              // this layer's pages [block][K|V][kv_head][block_size][head_dim]
  const float* cos = nullptr;      // [rows][head_dim / 2]
  const float* sin = nullptr;      // [rows][head_dim / 2]
  const int64_t* slots = nullptr;  // [rows]: element offset in `kv` of (position, K, head 0); < 0:
                                   // a row that pads the step, whose keys and values go nowhere
  int rows = 0, heads = 0, kv_heads = 0, head_dim = 0, block_size = 0, inputs = 0;
  SquareSums squares;
  float epsilon = 0;
  bool fp8_kv = false;  // pages are of e4m3; else of bfloat16
};

// residual += x W^T; then what the next norm needs: scaled = norm_weight * residual, and `squares`.
struct ResidualArgs {
  const __nv_bfloat16* weight = nullptr;  // [outputs][inputs]
  const __nv_bfloat16* x = nullptr;       // [rows][inputs]
  float* residual = nullptr;              // in and out: [rows][outputs]
  const float* norm_weight = nullptr;     // [outputs]
  __nv_bfloat16* scaled = nullptr;        // out: [rows][outputs]
  float* square_shares = nullptr;         // out: SquareSums::shares, in parts that the kernel names
  int square_stride = 0;                  // of square_shares
  int rows = 0, outputs = 0, inputs = 0;
};

// Logits of the vocabulary.
struct LogitsArgs {
  const __nv_bfloat16* weight = nullptr;  // [vocab][inputs]
  const __nv_bfloat16* x = nullptr;       // [rows][inputs]: norm weight * residual stream
  float* logits = nullptr;                // out: [rows][vocab], or null: only the best are wanted
  // out, or null: per row block of the kernel the best logits, as argmax.cuh ranks them;
  // SkinnyLogits alone can.
  uint64_t* best = nullptr;  // [LogitsBestParts(...)][kMaxSkinnyRows]
  int rows = 0, vocab = 0, inputs = 0;
  SquareSums squares;
  float epsilon = 0;
};

}  // namespace tandem::engine::cuda
