// Products of a large weight matrix with few rows of activations: the linear layers of a decode
// step, each fused with what stands at its borders. They are bound by reading the weights once.
//
// Shape of a kernel: the weights are the M side of the tensor core's product and the activations
// (up to kMaxSkinnyRows) its N side. Each multiprocessor runs one block that streams its part of
// the weights through a ring in shared memory; a ring is at most half of the shared memory, so that
// the next kernel's blocks fit beside it and fill their ring while this kernel still runs.
// The work is cut in units of (row block, slice of K), dealt evenly to the blocks in order. A row
// block that is shared by several thread blocks is summed by the last of them to finish, in the
// order of K.
//
// Order of summation: fixed by the shapes, the number of multiprocessors and the bucket of the
// number of rows (1, 8, 16, 32, 64). Within a bucket a row's result does not depend on the other
// rows.
//
// RMS normalisation (Zhang and Sennrich, 2019, arXiv:1910.07467) has no pass of its own. With the
// residual stream h and norm weight g, x = h * g / rms(h): the producer of h also writes g * h in
// bfloat16 and its share of the sum of h^2; the consumer multiplies g * h by its weights and
// divides by rms(h) in its epilogue.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

inline constexpr int kMaxSkinnyRows = 64;

// Sums of squares of the residual stream, one share per row block of the kernel that wrote it.
struct SquareSums {
  float* shares = nullptr;  // [parts][kMaxSkinnyRows]
  int parts = 0;
};

// Memory that the kernels of one stream share. `counters` starts as zeros and is zero again after
// every kernel.
struct SkinnyScratch {
  float* partial = nullptr;      // SkinnyPartialFloats() elements
  uint32_t* counters = nullptr;  // [kSkinnyCounters]
};
inline constexpr int kSkinnyCounters = 8192;
size_t SkinnyPartialFloats(int multiprocessors);

// How many shares SkinnyResidual writes for these shapes; at most kMaxSquareParts.
inline constexpr int kMaxSquareParts = 1024;
int ResidualSquareParts(int rows, int outputs, int inputs, int multiprocessors);

// The first half of the feed-forward block: silu(gate) * up.
struct GateUpArgs {
  const __nv_bfloat16* weight = nullptr;  // [2 * inner][inputs], gate rows first
  const __nv_bfloat16* x = nullptr;       // [rows][inputs]: norm weight * residual stream
  __nv_bfloat16* out = nullptr;           // [rows][inner]
  int rows = 0, inner = 0, inputs = 0;
  SquareSums squares;  // of the residual stream
  float epsilon = 0;
};
cudaError_t SkinnyGateUp(const GateUpArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options);

// Query, key and value projections with bias, rotary embedding (element i pairs with i +
// head_dim / 2), and the write of keys and values into their pages.
struct QkvArgs {
  const __nv_bfloat16* weight = nullptr;  // [(heads + 2 * kv_heads) * head_dim][inputs]
  const __nv_bfloat16* bias = nullptr;    // [(heads + 2 * kv_heads) * head_dim] or null
  const __nv_bfloat16* x = nullptr;       // [rows][inputs]: norm weight * residual stream
  __nv_bfloat16* q = nullptr;             // out: [rows][heads][head_dim]
  __nv_bfloat16* kv = nullptr;     // this layer's pages [block][K|V][kv_head][block_size][head_dim]
  const float* cos = nullptr;      // [rows][head_dim / 2]
  const float* sin = nullptr;      // [rows][head_dim / 2]
  const int64_t* slots = nullptr;  // [rows]: element offset in `kv` of (position, K, head 0)
  int rows = 0, heads = 0, kv_heads = 0, head_dim = 0, block_size = 0, inputs = 0;
  SquareSums squares;
  float epsilon = 0;
};
cudaError_t SkinnyQkv(const QkvArgs& args, const SkinnyScratch& scratch,
                      const LaunchOptions& options);

// residual += x W^T; then what the next norm needs: scaled = norm_weight * residual, and `squares`.
struct ResidualArgs {
  const __nv_bfloat16* weight = nullptr;       // [outputs][inputs]
  const __nv_bfloat16* x = nullptr;            // [rows][inputs]
  float* residual = nullptr;                   // in and out: [rows][outputs]
  const __nv_bfloat16* norm_weight = nullptr;  // [outputs]
  __nv_bfloat16* scaled = nullptr;             // out: [rows][outputs]
  float* square_shares = nullptr;              // out: [ResidualSquareParts(...)][kMaxSkinnyRows]
  int rows = 0, outputs = 0, inputs = 0;
};
cudaError_t SkinnyResidual(const ResidualArgs& args, const SkinnyScratch& scratch,
                           const LaunchOptions& options);

// Logits of the vocabulary, and per row block the best of them, as argmax.cuh ranks
// them.
struct LogitsArgs {
  const __nv_bfloat16* weight = nullptr;  // [vocab][inputs]
  const __nv_bfloat16* x = nullptr;       // [rows][inputs]: norm weight * residual stream
  float* logits = nullptr;                // out: [rows][vocab], or null: only the best are wanted
  uint64_t* best = nullptr;               // out: [LogitsBestParts(...)][kMaxSkinnyRows]
  int rows = 0, vocab = 0, inputs = 0;
  SquareSums squares;
  float epsilon = 0;
};
int LogitsBestParts(int rows, int vocab, int inputs, int multiprocessors);
cudaError_t SkinnyLogits(const LogitsArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options);

}  // namespace tandem::engine::cuda
