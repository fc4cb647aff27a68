#include <algorithm>

#include "engine/kernels/cuda/int4_linear.h"
#include "engine/kernels/cuda/int4_linear_kernel.cuh"
#include "engine/kernels/cuda/int4_linear_plan.h"

namespace tandem::engine::cuda {
namespace {

// Tiles by bucket of rows. Every ring fits in the 99 KB of sm_89. The warps of a thread block are a
// multiple of four, one for each scheduler of a multiprocessor, where the number of tiles allows
// it.
template <bool kFine>
struct Few {
  using Rows1 = Int4Tile<8, 1, 1, 8, 3, 1, 6, kFine>;
  using Rows8 = Int4Tile<8, 8, 1, 8, 3, 1, 4, kFine>;
  using Rows16 = Int4Tile<16, 16, 8, 1, 2, kFine ? 1 : 2, kFine ? 5 : 3, kFine>;
  using Rows32 = Int4Tile<32, 32, 8, 1, 2, 1, 5, kFine>;
  using Rows64 = Int4Tile<64, 64, 8, 1, 2, 1, 4, kFine>;
};
// Two tiles are a multiprocessor's share of the output and down projections'.
template <bool kFine>
struct Narrow : Few<kFine> {
  using Rows1 = Int4Tile<8, 1, 1, 8, 2, kFine ? 1 : 2, kFine ? 7 : 4, kFine>;
  using Rows8 = Int4Tile<8, 8, 1, 8, 2, 1, kFine ? 4 : 5, kFine>;
};
// Gate and up: what divides eighteen tiles, a multiprocessor's share of Qwen2.5-7B's.
template <bool kFine>
struct Tall {
  using Rows1 = Int4Tile<8, 1, 2, 4, 3, kFine ? 1 : 2, kFine ? 5 : 3, kFine>;
  using Rows8 = Int4Tile<8, 8, 2, 4, 3, 1, kFine ? 3 : 4, kFine>;
  using Rows16 = Int4Tile<16, 16, 6, 2, 3, 1, 3, kFine>;
  using Rows32 = Int4Tile<32, 32, 9, 1, 2, 1, 4, kFine>;
  using Rows64 = Int4Tile<64, 64, 9, 1, 2, 1, 4, kFine>;
};
constexpr int kLeastShared = 99 << 10;

template <class Tiles, class Visit>
auto VisitRows(int rows, const Visit& visit) {
  if (rows == 1) return visit.template operator()<typename Tiles::Rows1>();
  if (rows <= 8) return visit.template operator()<typename Tiles::Rows8>();
  if (rows <= 16) return visit.template operator()<typename Tiles::Rows16>();
  if (rows <= 32) return visit.template operator()<typename Tiles::Rows32>();
  return visit.template operator()<typename Tiles::Rows64>();
}

// Calls visit.operator()<Tile>() with the tile for a product.
template <template <bool> class Tiles, class Visit>
auto VisitTile(const Int4Matrix& matrix, int rows, const Visit& visit) {
  return matrix.sets == 1 ? VisitRows<Tiles<false>>(rows, visit)
                          : VisitRows<Tiles<true>>(rows, visit);
}

template <template <bool> class Tiles, class Op>
cudaError_t LaunchProduct(const Op& op, const Int4Matrix& matrix, const Int4Scratch& scratch,
                          const LaunchOptions& options) {
  if (!SupportsInt4Linear(op.rows, op.inputs, options)) return cudaErrorInvalidValue;
  return VisitTile<Tiles>(matrix, op.rows, [&]<class Tile>() {
    static_assert(Tile::kSharedBytes <= kLeastShared);
    return LaunchInt4<Tile>(op, matrix, PlanInt4<Tile>(matrix, options), scratch, options);
  });
}

}  // namespace

size_t Int4PartialFloats(int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * kMostInt4PartialFloats;
}

bool SupportsInt4Linear(int rows, int inputs, const LaunchOptions& options) {
  return rows >= 1 && rows <= kMaxInt4Rows && inputs >= 8 && inputs % 8 == 0 &&
         options.shared_bytes >= kLeastShared;
}

int Int4SquareParts(const Int4Matrix& matrix, int rows, const LaunchOptions& options) {
  return VisitTile<Narrow>(matrix, rows, [&]<class Tile>() {
    const Int4Plan plan = PlanInt4<Tile>(matrix, options);
    return plan.row_blocks * plan.parts;
  });
}

cudaError_t Int4GateUp(const GateUpArgs& args, const Int4Matrix& matrix, const Int4Scratch& scratch,
                       const LaunchOptions& options) {
  return LaunchProduct<Tall>(GateUpOp{args, args.inner}, matrix, scratch, options);
}

cudaError_t Int4Qkv(const QkvArgs& args, const Int4Matrix& matrix, const Int4Scratch& scratch,
                    const LaunchOptions& options) {
  const int pairs = (args.heads + 2 * args.kv_heads) * args.head_dim / 2;
  return LaunchProduct<Few>(QkvOp{args, pairs}, matrix, scratch, options);
}

cudaError_t Int4Residual(const ResidualArgs& args, const Int4Matrix& matrix,
                         const Int4Scratch& scratch, const LaunchOptions& options) {
  return LaunchProduct<Narrow>(ResidualOp{args, args.outputs}, matrix, scratch, options);
}

}  // namespace tandem::engine::cuda
