// The linear layers of linear_args.h for more than a handful of rows on sm_90a, on the tensor cores
// by warpgroup products (wgmma) of tiles that the copy engine brings (TMA).
//
// Shape of a kernel: one thread block per multiprocessor, which lives as long as the product. A
// producer thread keeps a ring of tiles in shared memory full, one or two warpgroups multiply, and
// a warp prepares what their epilogues need. How the work is cut follows from the number of tiles:
//  - few: a cluster computes each tile, of 128 weight rows for up to 256 rows, every thread block a
//    part of K; they join in shared memory;
//  - up to 512 rows, where tiles of 288 weight rows fill all multiprocessors in whole rounds:
//  those,
//    uncut (gate and up, and the vocabulary: their epilogues take units of any height);
//  - else tiles of 256 weight rows. For up to 64 rows or an odd number of 128 a round's worth of
//  them
//    is dealt out as equal ranges of (tile, chunk of K) (stream-K: Osama et al., 2023,
//    arXiv:2301.03598); the block that has a tile's first chunks adds what the others computed. For
//    other numbers pairs of thread blocks take two tiles that lie one above the other and share the
//    loads of weights; the tiles of a last round that would be too empty are cut into two or four
//    parts of K.
//
// Order of summation: with scratch memory it depends on the shapes, the number of rows, the number
// of multiprocessors and how these are grouped, for that decides how many clusters run at once: two
// cards of one name may differ in it. Without scratch memory no tile is cut, and a row's result
// depends on nothing but the row.
//
// Products of kWideRows and more, but for logits, are hopper_wide_linear.h's, which cuts none.
//
// With scratch memory thread blocks wait for sums of others, so all of a launch must come to run:
// they do where one process at a time has the card. Under MPS the kernels of two processes may
// each hold multiprocessors that the other one waits for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/linear_args.h"

namespace tandem::engine::cuda {

// Memory that the kernels of one stream share, or null: then no tile is cut. `flags` starts as
// zeros and is zero again after every kernel.
struct HopperScratch {
  float* partial = nullptr;   // HopperPartialFloats() elements
  uint32_t* flags = nullptr;  // [HopperFlags()]
};
size_t HopperPartialFloats(int multiprocessors);
size_t HopperFlags(int multiprocessors);

// Whether these kernels take a product of this shape: `outputs` counts rows of the weight (a half
// of them for GateUp), head_dim is Qkv's or 0. Needs sm_90a.
bool HopperSupports(int outputs, int inputs, int head_dim);

// How many shares HopperResidual writes: one per kSquareColumns outputs.
inline constexpr int kHopperSquareColumns = 128;
inline int HopperSquareParts(int outputs) {
  return (outputs + kHopperSquareColumns - 1) / kHopperSquareColumns;
}

cudaError_t HopperGateUp(const GateUpArgs& args, const HopperScratch& scratch,
                         const LaunchOptions& options);
cudaError_t HopperQkv(const QkvArgs& args, const HopperScratch& scratch,
                      const LaunchOptions& options);
cudaError_t HopperResidual(const ResidualArgs& args, const HopperScratch& scratch,
                           const LaunchOptions& options);
// Writes logits, not `best`.
cudaError_t HopperLogits(const LogitsArgs& args, const HopperScratch& scratch,
                         const LaunchOptions& options);

}  // namespace tandem::engine::cuda
