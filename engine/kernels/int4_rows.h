// Weights of 4 bits on their way from a checkpoint to a device that reads them as they are:
//
//   weight[row][input] = scale[row][group of input] * (value[row][input] - zero point)
//
// A group is `group_size` neighbouring inputs.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace tandem::engine {

// Which rows of a weight an epilogue needs together.
enum class Int4Pairs {
  kRows,    // any two neighbours
  kHalves,  // row i and row n / 2 + i: gate and up
  kHeads,   // element i and i + head_dim / 2 of a head: what rotation takes together
};

struct Int4Shape {
  Int4Pairs pairs = Int4Pairs::kRows;
  size_t n = 0;           // rows: output columns
  size_t k = 0;           // inputs
  size_t group_size = 0;  // 32, 64, 128 or k

  size_t words() const { return (k + 7) / 8; }
  size_t groups() const { return (k + group_size - 1) / group_size; }
};

// Some rows of a weight.
struct Int4Rows {
  const uint32_t* values = nullptr;  // [rows][words()] of eight values, the lowest bits first
  const uint32_t* scales = nullptr;  // [rows][groups()], ScaleWord()
  size_t first = 0, rows = 0;
};

// The scale and the zero point (below 16) of a group: the zero point in the four lowest bits, a
// float32 without them in the others. A scale that was float16 or bfloat16 is exact.
inline uint32_t ScaleWord(float scale, uint32_t zero) {
  return (std::bit_cast<uint32_t>(scale) & ~15u) | zero;
}

}  // namespace tandem::engine
