// engine_bench on a GPU.
#pragma once

#include <string>

namespace tandem::engine {

struct GpuSuiteOptions {
  std::string json;  // file for the results; empty: none
  std::string rows;  // only rows whose names contain this
  int seconds = 12;  // of the row of mixed load
  bool batch_invariant = false;
  bool pad_query_heads = false;
};

// Loads dummy weights in the shape of Qwen2.5-7B (with YaRN for 131,072 positions), measures the
// card's ceilings and every row, prints a table. Returns the program's exit status: 0 also where a
// row is slower than its bound, 1 where something failed.
int RunGpuSuite(const GpuSuiteOptions& options);

}  // namespace tandem::engine
