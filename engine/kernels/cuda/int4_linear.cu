#include <algorithm>
#include <type_traits>

#include "engine/kernels/cuda/int4_linear.h"
#include "engine/kernels/cuda/int4_linear_kernel.cuh"
#include "engine/kernels/cuda/int4_linear_plan.h"

namespace tandem::engine::cuda {
namespace {

// Tiles by bucket of rows, for scales of which a block of inputs has up to kSets. Up to 16 rows two
// thread blocks fit on a multiprocessor, so that the next kernel fills its ring meanwhile.
template <int kSets>
struct Few {
  using Rows1 = Int4Tile<8, 1, 1, 8, 3, 8, 3, kSets>;
  using Rows8 = Int4Tile<8, 8, 1, 8, 3, 4, 4, kSets>;
  using Rows16 = Int4Tile<16, 16, 8, 1, 2, 1, 4, kSets>;
  using Rows32 = Int4Tile<32, 32, 8, 1, 2, 1, 5, kSets>;
  using Rows64 = Int4Tile<64, 64, 8, 1, 2, 1, 5, kSets>;
};
// Two tiles are a multiprocessor's share of the output and down projections'.
template <int kSets>
struct Narrow : Few<kSets> {
  using Rows1 = Int4Tile<8, 1, 1, 8, 2, 8, 4, kSets>;
  using Rows8 = Int4Tile<8, 8, 1, 8, 2, 8, 3, kSets>;
};
// Gate and up: as high as a multiprocessor's share of Qwen2.5-7B's, so that activations are read
// once.
template <int kSets>
struct Tall : Few<kSets> {
  using Rows1 = Int4Tile<8, 1, 2, 4, 3, 4, 3, kSets>;
  using Rows8 = Int4Tile<8, 8, 9, 1, 2, 1, 4, kSets>;
  using Rows16 = Int4Tile<16, 16, 9, 1, 2, 1, 3, kSets>;
  using Rows32 = Int4Tile<32, 32, 9, 1, 2, 1, 5, kSets>;
  using Rows64 = Int4Tile<64, 64, 9, 1, 2, 1, 5, kSets>;
};

// The same with a ring that fits in 99 KB, as all but the largest do.
constexpr int kLeastShared = 99 << 10;
template <class Tile>
using Short = std::conditional_t<Tile::kSharedBytes <= kLeastShared, Tile,
                                 typename Tile::template WithStages<2>>;

template <class Tile, class Visit>
auto VisitFitting(int shared_bytes, const Visit& visit) {
  static_assert(Short<Tile>::kSharedBytes <= kLeastShared);
  return Tile::kSharedBytes <= shared_bytes ? visit.template operator()<Tile>()
                                            : visit.template operator()<Short<Tile>>();
}

template <class Tiles, class Visit>
auto VisitRows(int rows, int shared_bytes, const Visit& visit) {
  if (rows == 1) return VisitFitting<typename Tiles::Rows1>(shared_bytes, visit);
  if (rows <= 8) return VisitFitting<typename Tiles::Rows8>(shared_bytes, visit);
  if (rows <= 16) return VisitFitting<typename Tiles::Rows16>(shared_bytes, visit);
  if (rows <= 32) return VisitFitting<typename Tiles::Rows32>(shared_bytes, visit);
  return VisitFitting<typename Tiles::Rows64>(shared_bytes, visit);
}

// Calls visit.operator()<Tile>() with the tile for a product.
template <template <int> class Tiles, class Visit>
auto VisitTile(const Int4Matrix& matrix, int rows, int shared_bytes, const Visit& visit) {
  if (matrix.sets == 4) return VisitRows<Tiles<4>>(rows, shared_bytes, visit);
  if (matrix.sets == 2) return VisitRows<Tiles<2>>(rows, shared_bytes, visit);
  return VisitRows<Tiles<1>>(rows, shared_bytes, visit);
}

template <template <int> class Tiles, class Op>
cudaError_t LaunchProduct(const Op& op, const Int4Matrix& matrix, const Int4Scratch& scratch,
                          const LaunchOptions& options) {
  if (!SupportsInt4Linear(op.rows, op.inputs, options)) return cudaErrorInvalidValue;
  return VisitTile<Tiles>(matrix, op.rows, options.shared_bytes, [&]<class Tile>() {
    return LaunchInt4<Tile>(op, matrix, PlanInt4<Tile>(matrix, options), scratch, options);
  });
}

}  // namespace

size_t Int4PartialFloats(int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * Tall<2>::Rows64::kPartialFloats;
}

bool SupportsInt4Linear(int rows, int inputs, const LaunchOptions& options) {
  return rows >= 1 && rows <= kMaxInt4Rows && inputs >= 8 && inputs % 8 == 0 &&
         options.shared_bytes >= kLeastShared;
}

int Int4SquareParts(const Int4Matrix& matrix, int rows, const LaunchOptions& options) {
  return VisitTile<Narrow>(matrix, rows, options.shared_bytes, [&]<class Tile>() {
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
