// Products of 4-bit weights (int4_matrix.h) with up to kMaxInt4Rows rows of bfloat16 activations:
// the linear layers of a decode step, each fused with what stands at its borders, as
// skinny_linear.h has them for bfloat16. They are bound by reading the weights once.
//
// Shape of a kernel: weights become bfloat16 in registers, where q - zero is exact, and are the M
// side of the tensor core's product; activations are its N side. Sums of a group are multiplied by
// its scale in float32, so that no weight is rounded. Each multiprocessor runs one thread block
// that streams its part of the weights through a ring in shared memory. A row block of the product
// is a number of tiles; for few rows a thread block has whole ones, and for more, where reading the
// activations again for each of them would cost more than the weights, each is cut along K: the
// parts lie in global memory, and every thread block of them sums its share.
//
// Order of summation: fixed by the shapes, the number of multiprocessors and the bucket of the
// number of rows (1, 8, 16, 32, 64). Within a bucket a row's result does not depend on the other
// rows.
//
// Where K is cut thread blocks wait for others of their launch, as in hopper_linear.h.
//
// On sm_90a hopper_int4_linear.h is faster for more than 16 rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/int4_matrix.h"
#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/linear_args.h"
#include "engine/kernels/cuda/turns.h"

namespace tandem::engine::cuda {

inline constexpr int kMaxInt4Rows = 64;

// Memory that the kernels of one stream share. `counters` starts as zeros and is zero again after
// every kernel.
struct Int4Scratch {
  float* partial = nullptr;      // Int4PartialFloats() elements
  uint32_t* counters = nullptr;  // [kInt4Counters]
  uint32_t* turns = nullptr;     // [kTurns]
};
inline constexpr int kInt4Counters = 1024;
size_t Int4PartialFloats(int multiprocessors);

// Products of `rows` rows of activations with weights of `inputs` inputs.
bool SupportsInt4Linear(int rows, int inputs, const LaunchOptions& options);

// How many shares Int4Residual writes for these; at most kMaxSquareParts (skinny_linear.h).
int Int4SquareParts(const Int4Matrix& matrix, int rows, const LaunchOptions& options);

// The arguments' own `weight` is not read. Pairs of the matrix: kHalves for GateUp, kHeads for Qkv,
// kRows for Residual.
cudaError_t Int4GateUp(const GateUpArgs& args, const Int4Matrix& matrix, const Int4Scratch& scratch,
                       const LaunchOptions& options);
cudaError_t Int4Qkv(const QkvArgs& args, const Int4Matrix& matrix, const Int4Scratch& scratch,
                    const LaunchOptions& options);
cudaError_t Int4Residual(const ResidualArgs& args, const Int4Matrix& matrix,
                         const Int4Scratch& scratch, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
