#include <algorithm>

#include "engine/kernels/cuda/hopper_int4_linear.h"
#include "engine/kernels/cuda/int4_linear_kernel.cuh"
#include "engine/kernels/cuda/int4_linear_plan.h"

namespace tandem::engine::cuda {
namespace {

// A warp has one tile. kWarps: of a thread block, each of which holds a row block's sums.
template <int kRows, int kWarps, bool kFine>
using Tile = Int4Tile<kRows, kRows, kWarps, 1, 1, 2, 4, kFine, true>;
constexpr int kFewWarps = 16;
// Gate and up: eighteen tiles are a multiprocessor's share of Qwen2.5-7B's.
constexpr int kTallWarps = 20;

// Calls visit.operator()<Tile>() with the tile for a product.
template <int kWarps, class Visit>
auto VisitTile(const Int4Matrix& matrix, int rows, const Visit& visit) {
  if (rows <= 32) {
    return matrix.sets == 1 ? visit.template operator()<Tile<32, kWarps, false>>()
                            : visit.template operator()<Tile<32, kWarps, true>>();
  }
  return matrix.sets == 1 ? visit.template operator()<Tile<64, kWarps, false>>()
                          : visit.template operator()<Tile<64, kWarps, true>>();
}

template <int kWarps, class Op>
cudaError_t LaunchProduct(const Op& op, const Int4Matrix& matrix, const Int4Scratch& scratch,
                          const LaunchOptions& options) {
  if (!SupportsHopperInt4Linear(op.rows, op.inputs, options)) return cudaErrorInvalidValue;
  return VisitTile<kWarps>(matrix, op.rows, [&]<class Tile>() {
    return LaunchInt4<Tile>(op, matrix, PlanInt4<Tile>(matrix, options), scratch, options);
  });
}

}  // namespace

bool SupportsHopperInt4Linear(int rows, int inputs, const LaunchOptions& options) {
  constexpr int kLeastShared =
      std::max(Tile<64, kTallWarps, true>::kSharedBytes, Tile<64, kFewWarps, true>::kSharedBytes);
  return rows >= kLeastHopperInt4Rows && SupportsInt4Linear(rows, inputs, options) &&
         options.shared_bytes >= kLeastShared;
}

int HopperInt4SquareParts(const Int4Matrix& matrix, int rows, const LaunchOptions& options) {
  return VisitTile<kFewWarps>(matrix, rows, [&]<class Tile>() {
    const Int4Plan plan = PlanInt4<Tile>(matrix, options);
    return plan.row_blocks * plan.parts;
  });
}

cudaError_t HopperInt4GateUp(const GateUpArgs& args, const Int4Matrix& matrix,
                             const Int4Scratch& scratch, const LaunchOptions& options) {
  return LaunchProduct<kTallWarps>(GateUpOp{args, args.inner}, matrix, scratch, options);
}

cudaError_t HopperInt4Qkv(const QkvArgs& args, const Int4Matrix& matrix, const Int4Scratch& scratch,
                          const LaunchOptions& options) {
  const int pairs = (args.heads + 2 * args.kv_heads) * args.head_dim / 2;
  return LaunchProduct<kFewWarps>(QkvOp{args, pairs}, matrix, scratch, options);
}

cudaError_t HopperInt4Residual(const ResidualArgs& args, const Int4Matrix& matrix,
                               const Int4Scratch& scratch, const LaunchOptions& options) {
  return LaunchProduct<kFewWarps>(ResidualOp{args, args.outputs}, matrix, scratch, options);
}

}  // namespace tandem::engine::cuda
