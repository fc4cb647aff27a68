// What the instruction-set-specific part of attention works on.
#pragma once

#include <cstddef>

namespace tandem::engine {

inline constexpr size_t kTile = 16;          // positions
inline constexpr float kNoScore = -1.0e30f;  // below every score; exp of it is zero

// Per-thread memory; all 64-byte aligned.
struct AttentionScratch {
  float* keys = nullptr;         // [head_dim][kTile]
  float* values = nullptr;       // [kTile][padded_dim]
  float* out = nullptr;          // [rows][padded_dim], not yet divided by the sum of weights
  float* weight_sums = nullptr;  // [rows][kTile], one sum per place in the tile
  float* maximum = nullptr;      // [rows]
  float* scores = nullptr;       // [row group][kTile]
};

// Queries of one sequence that read the same KV head: row = query * group + head in group.
struct AttentionUnit {
  const float* const* q_rows = nullptr;  // [rows], each [head_dim]
  size_t rows = 0;
  size_t group = 0;  // query heads per KV head
  size_t start = 0;  // position of the first query
  size_t head_dim = 0;
  size_t padded_dim = 0;  // multiple of kTile
  float scale = 1;
  AttentionScratch scratch;
};

struct AttentionTile {
  const float* keys = nullptr;    // [head_dim][kTile]
  const float* values = nullptr;  // [positions] at value_stride, each [padded_dim]
  size_t value_stride = 0;
  size_t first_position = 0;
  size_t positions = 0;  // valid in this tile
};

}  // namespace tandem::engine
