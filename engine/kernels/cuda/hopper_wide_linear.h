// The products of hopper_linear.h for more than 512 rows, which dispatches to these.
//
// Pairs of thread blocks, one on every multiprocessor, take two tiles of 128 rows x 256 weight rows
// that lie one above the other or side by side, whichever comes out more evenly, and share the
// loads of what these have in common; two warpgroups multiply, of 64 rows each. The tiles of a last
// round that would keep half of the device busy at most are cut into halves of 128 weight rows.
//
// No sum is cut: a row's result depends on nothing but the row, and is what hopper_linear.h
// computes without its scratch memory. Thread blocks wait for their pair's other half alone, which
// runs whenever they do.
#pragma once

#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"
#include "engine/kernels/cuda/linear_args.h"

namespace tandem::engine::cuda {

// Rows from which these are faster.
inline constexpr int kWideRows = 513;

cudaError_t WideGateUp(const GateUpArgs& args, const LaunchOptions& options);
cudaError_t WideQkv(const QkvArgs& args, const LaunchOptions& options);
cudaError_t WideResidual(const ResidualArgs& args, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
