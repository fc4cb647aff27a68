// What the matrix products share: arguments, and one function or table per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/kernels/cpu/linear.h"

namespace tandem::engine {

struct LinearArgs {
  const PackedMatrix* w;
  const float* bias;  // [n] or null
  const float* x;     // [rows] at x_stride, each [k]
  size_t x_stride;
  size_t rows;
  float* y;  // [rows] at y_stride, each [n]
  size_t y_stride;
};

// Computes the output columns of panels [panel_begin, panel_end).
void LinearFloat32Panels(const LinearArgs& args, size_t panel_begin, size_t panel_end);

// The bfloat16 product of one instruction set. `inputs` are args.x rounded to bfloat16, in
// LinearScratchBytes() bytes, in an order that is the kernel's own. Thread-safe: several threads
// may round different rows, and later compute different panels.
struct BF16Kernel {
  void (*round_rows)(const LinearArgs& args, size_t begin, size_t end, void* inputs);
  void (*panels)(const LinearArgs& args, const void* inputs, size_t panel_begin, size_t panel_end);
};

// Null where the CPU, or the operating system, does not have what the kernel needs.
const BF16Kernel* AmxBF16Kernel();
const BF16Kernel* DotPairsBF16Kernel();       // AVX-512 with VDPBF16PS
const BF16Kernel* WideningBF16Kernel();       // AVX-512 in float32; same results as DotPairs
const BF16Kernel* FastestAvx512BF16Kernel();  // one of these two

// `scratch` as in Linear.
void LinearBF16(const BF16Kernel& kernel, const LinearArgs& args, void* scratch, Threads* threads);

// Length of a row of inputs in bfloat16 weights.
inline size_t PaddedInputs(size_t k) { return (k + kKPadding - 1) / kKPadding * kKPadding; }

// Rows of the next tile when `left` rows remain and a tile takes at most `most`. The rows are
// shared evenly: two tiles of 8 keep the arithmetic units busier than one of 12 and one of 4.
inline size_t NextTileRows(size_t left, size_t most) {
  const size_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// Weights to fetch from memory while others are multiplied. A lone pass over a panel fetches a
// little ahead of itself, for the hardware's prefetcher stops at page ends. Several passes, of one
// row tile each, share the next panel evenly, so that memory works in all of them and not in the
// first alone.
class WeightsAhead {
 public:
  WeightsAhead() = default;
  // `last`: no panel follows this one.
  WeightsAhead(const std::byte* panel, size_t panel_bytes, bool last, size_t pass, size_t passes) {
    const bool own = passes == 1 || last;
    at_ = own ? panel + kOwnSteps * kStepBytes : panel + panel_bytes + panel_bytes / passes * pass;
    step_ = own ? kStepBytes : kStepBytes / passes;
  }

  // Once per kStepBytes of weights multiplied. Inlined by force: GCC takes a function that only
  // prefetches for one without effect, and drops its calls.
  __attribute__((always_inline)) void Prefetch() {
    __builtin_prefetch(at_, 0, 2);
    __builtin_prefetch(at_ + step_ / 2, 0, 2);
    at_ += step_;
  }

 private:
  static constexpr size_t kStepBytes = 128;  // one float32 input, or a pair of bfloat16 ones
  static constexpr size_t kOwnSteps = 32;

  const std::byte* at_ = nullptr;
  size_t step_ = 0;
};

}  // namespace tandem::engine
