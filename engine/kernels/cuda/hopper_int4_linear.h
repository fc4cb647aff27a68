// The products of int4_linear.h for kLeastHopperInt4Rows to kMaxInt4Rows rows on sm_90a, whose
// tensor cores multiply for a warpgroup at a time (wgmma): from so many rows on those of one warp
// (mma) bound the product, not memory. Weights become bfloat16 in registers here as there, and the
// form, the memory and the order of summation are the same; buckets are up to 32 and up to 64 rows.
#pragma once

#include "engine/kernels/cuda/int4_linear.h"

namespace tandem::engine::cuda {

inline constexpr int kLeastHopperInt4Rows = 17;

bool SupportsHopperInt4Linear(int rows, int inputs, const LaunchOptions& options);

// How many shares HopperInt4Residual writes for these; at most kMaxSquareParts.
int HopperInt4SquareParts(const Int4Matrix& matrix, int rows, const LaunchOptions& options);

cudaError_t HopperInt4GateUp(const GateUpArgs& args, const Int4Matrix& matrix,
                             const Int4Scratch& scratch, const LaunchOptions& options);
cudaError_t HopperInt4Qkv(const QkvArgs& args, const Int4Matrix& matrix, const Int4Scratch& scratch,
                          const LaunchOptions& options);
cudaError_t HopperInt4Residual(const ResidualArgs& args, const Int4Matrix& matrix,
                               const Int4Scratch& scratch, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
