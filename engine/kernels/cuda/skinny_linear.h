// Products of a large weight matrix with few rows of activations: the linear layers of a decode
// step, each fused with what stands at its borders. They are bound by reading the weights once.
//
// Shape of a kernel: the weights are the M side of the tensor core's product and the activations
// (up to kMaxSkinnyRows) its N side. Each multiprocessor runs one block that streams its part of
// the weights through a ring in shared memory; a ring is at most half of the shared memory, so that
// the next kernel's blocks fit beside it and fill their ring while this kernel ends. Where a
// device has less shared memory than sm_90, and less bandwidth to feed, the rings are shorter.
// The work is cut in units of (row block, slice of K), dealt evenly to the blocks in order. A row
// block that is shared by several thread blocks is summed by the last of them to finish, in the
// order of K.
//
// Order of summation: fixed by the shapes, the number of multiprocessors and the bucket of the
// number of rows (1, 8, 16, 32, 64). Within a bucket a row's result does not depend on the other
// rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/linear_args.h"
#include "engine/kernels/cuda/turns.h"

namespace tandem::engine::cuda {

inline constexpr int kMaxSkinnyRows = 64;

// Memory that the kernels of one stream share. `counters` starts as zeros and is zero again after
// every kernel.
struct SkinnyScratch {
  float* partial = nullptr;      // SkinnyPartialFloats() elements
  uint32_t* counters = nullptr;  // [kSkinnyCounters]
  uint32_t* turns = nullptr;     // [kTurns]
};
inline constexpr int kSkinnyCounters = 8192;
size_t SkinnyPartialFloats(int multiprocessors);

// Products of `outputs` rows of weights with `rows` rows of activations: at most kMaxSkinnyRows,
// and `inputs` a multiple of 8.
bool SupportsSkinnyLinear(int rows, int outputs, int inputs, const LaunchOptions& options);

// What a thread block works on at a time.
enum class SkinnyProduct { kQkv, kGateUp, kResidual, kLogits };
struct SkinnyTileShape {
  int rows = 0;    // of activations that it has room for
  int height = 0;  // rows of weights
  int depth = 0;   // of K
  int stages = 0;  // of the ring
  int shared_bytes = 0;
};
SkinnyTileShape SkinnyTileOf(SkinnyProduct product, int rows, int shared_bytes);

// How many shares SkinnyResidual writes for these shapes; at most kMaxSquareParts.
inline constexpr int kMaxSquareParts = 1024;
int ResidualSquareParts(int rows, int outputs, int inputs, const LaunchOptions& options);

cudaError_t SkinnyGateUp(const GateUpArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options);
cudaError_t SkinnyQkv(const QkvArgs& args, const SkinnyScratch& scratch,
                      const LaunchOptions& options);
cudaError_t SkinnyResidual(const ResidualArgs& args, const SkinnyScratch& scratch,
                           const LaunchOptions& options);

// How many parts of LogitsArgs::best SkinnyLogits writes.
int LogitsBestParts(int rows, int vocab, int inputs, const LaunchOptions& options);
cudaError_t SkinnyLogits(const LogitsArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options);

}  // namespace tandem::engine::cuda
