// Causal attention over pages for every head_dim up to 256 and every group of query heads: correct
// where the fast kernels do not fit. One thread block per (row, query head); its warps take
// positions in turn, each with a running maximum (Milakov and Gimelshein, 2018, arXiv:1805.02867),
// and are merged in their order at the end.
//
// Order of summation: a function of the row's position alone.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

struct PlainAttentionArgs {
  const __nv_bfloat16* q = nullptr;       // [rows][heads][head_dim]
  const void* kv = nullptr;               // pages [block][K|V][kv_head][block_size][head_dim]
  const int32_t* first_rows = nullptr;    // [num_items + 1]
  const int32_t* starts = nullptr;        // [num_items]; -1: padding, its rows are left alone
  const int32_t* first_blocks = nullptr;  // [num_items + 1]
  const int32_t* blocks = nullptr;
  __nv_bfloat16* out = nullptr;  // [rows][heads][head_dim]
  int rows = 0, num_items = 0, heads = 0, kv_heads = 0, head_dim = 0, block_size = 0;
  bool skip_single_rows = false;  // rows that are an item by themselves are another kernel's
  bool only_single_rows = false;  // all other rows are
  float scale = 0;                // of the scores
  bool fp8_kv = false;            // pages are of e4m3; else of bfloat16
};
cudaError_t PlainAttention(const PlainAttentionArgs& args, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
