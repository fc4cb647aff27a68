// Causal attention over paged keys and values, for ragged batches, and the write into the pages.
//
// Order of summation: for each (query, head), scores and values are accumulated over absolute
// positions in tiles of 16 aligned at position 0, with a running maximum (Milakov and
// Gimelshein, 2018, arXiv:1805.02867). It depends neither on the batch, on chunks, on the block
// size nor on the number of threads, so the result is bit-identical in all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/device/cpu/threads.h"
#include "engine/kernels/kv_pages.h"

namespace tandem::engine {

// A run of consecutive positions of one sequence within the batch's rows.
struct AttentionItem {
  size_t first_row = 0;  // of the batch
  int rows = 0;
  int start = 0;                         // position of the first row
  const int32_t* block_table = nullptr;  // [ceil((start + rows) / block_size)]
};

// Writes keys and values of all rows. k, v: [row] at `stride` elements, each [kv_heads][head_dim].
void WriteKv(const KvPages& pages, const AttentionItem* items, size_t num_items, const float* k,
             const float* v, size_t stride, Threads* threads);

// q: [row] at q_stride, each [heads][head_dim]; out the same at out_stride. Query head h reads KV
// head h / (heads / kv_heads). Keys and values of the rows themselves are already written.
void PagedAttention(const KvPages& pages, const AttentionItem* items, size_t num_items,
                    const float* q, size_t q_stride, int heads, float scale, float* out,
                    size_t out_stride, Threads* threads);

}  // namespace tandem::engine
