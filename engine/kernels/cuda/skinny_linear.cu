#include <algorithm>

#include "engine/kernels/cuda/skinny_linear.h"
#include "engine/kernels/cuda/skinny_linear_ops.cuh"

namespace tandem::engine::cuda {
namespace {

// Tiles by bucket. A stage is as high as the share of one of ~132 multiprocessors in the layer's
// outputs where that is small. The ring takes about half of Hopper's shared memory, but nearly all
// of it for 64 rows, whose sums need more registers than half a multiprocessor has.
template <SkinnyProduct kProduct>
struct Tiles {
  using Rows1 = SkinnyTile<8, 1, 32, 256, 6, 1>;
  using Rows8 = SkinnyTile<8, 8, 32, 256, 5, 1>;
  using Rows16 = SkinnyTile<16, 16, 32, 256, 4, 1>;
};
template <>
struct Tiles<SkinnyProduct::kQkv> {
  using Rows1 = SkinnyTile<8, 1, 36, 256, 5, 1>;
  using Rows8 = SkinnyTile<8, 8, 36, 256, 4, 1>;
  using Rows16 = SkinnyTile<16, 16, 36, 256, 4, 1>;
};
template <>
struct Tiles<SkinnyProduct::kLogits> : Tiles<SkinnyProduct::kResidual> {
  using Rows8 = SkinnyTile<8, 8, 64, 128, 6, 2, true>;
  using Rows16 = SkinnyTile<16, 16, 64, 128, 5, 2, true>;
};
template <>
struct Tiles<SkinnyProduct::kGateUp> {
  using Rows1 = SkinnyTile<8, 1, 48, 256, 4, 1>;
  using Rows8 = SkinnyTile<8, 8, 64, 256, 3, 2>;
  using Rows16 = SkinnyTile<16, 16, 128, 128, 3, 4, true>;
};
using Rows32 = SkinnyTile<32, 32, 64, 128, 4, 2, true>;
using Rows64 = SkinnyTile<64, 64, 128, 128, 4, 4, true>;

// For devices with less shared memory: no more than the 99 KB of sm_89, with some 16 KB of weights
// on their way or more. Up to 32 rows nothing but the length of the ring differs.
using Rows64Short = SkinnyTile<64, 64, 64, 64, 4, 4, true>;
constexpr int kLeastShared = 99 << 10;
template <class Tile>
using Short = typename Tile::template WithStages<
    Tile::template WithStages<3>::kSharedBytes <= kLeastShared ? 3 : 2>;

// Calls visit.operator()<Tile>() with the tile for a product.
template <class Long, class Less, class Visit>
auto VisitFitting(int shared_bytes, const Visit& visit) {
  static_assert(Less::kSharedBytes <= kLeastShared);
  return Long::kSharedBytes <= shared_bytes ? visit.template operator()<Long>()
                                            : visit.template operator()<Less>();
}
template <SkinnyProduct kProduct, class Visit>
auto VisitTile(int rows, int shared_bytes, const Visit& visit) {
  using T = Tiles<kProduct>;
  using Rows1 = typename T::Rows1;
  using Rows8 = typename T::Rows8;
  using Rows16 = typename T::Rows16;
  if (rows == 1) return VisitFitting<Rows1, Short<Rows1>>(shared_bytes, visit);
  if (rows <= 8) return VisitFitting<Rows8, Short<Rows8>>(shared_bytes, visit);
  if (rows <= 16) return VisitFitting<Rows16, Short<Rows16>>(shared_bytes, visit);
  if (rows <= 32) return VisitFitting<Rows32, Short<Rows32>>(shared_bytes, visit);
  return VisitFitting<Rows64, Rows64Short>(shared_bytes, visit);
}

template <class Tile, class Op>
cudaError_t LaunchTile(const Op& op, const SkinnyScratch& scratch, const LaunchOptions& options) {
  auto kernel = SkinnyLinearKernel<Tile, Op>;
  static PerDevice<cudaError_t> prepared;
  const cudaError_t refused = prepared.Get([&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Tile::kSharedBytes);
  });
  if (refused != cudaSuccess) return refused;
  const SkinnyPlan plan =
      PlanFor<Tile>(op.granules, Op::kPaired, op.inputs, options.multiprocessors);
  if (plan.blocks > kSkinnyCounters && Tile::kCut) return cudaErrorInvalidValue;
  return Launch(kernel, dim3(static_cast<unsigned>(plan.grid)), kSkinnyThreads, Tile::kSharedBytes,
                options, op, plan, scratch);
}

template <SkinnyProduct kProduct, class Op>
cudaError_t LaunchProduct(const Op& op, const SkinnyScratch& scratch,
                          const LaunchOptions& options) {
  if (!SupportsSkinnyLinear(op.rows, op.granules, op.inputs, options)) {
    return cudaErrorInvalidValue;
  }
  return VisitTile<kProduct>(op.rows, options.shared_bytes,
                             [&]<class Tile>() { return LaunchTile<Tile>(op, scratch, options); });
}

template <SkinnyProduct kProduct>
int BlocksOf(int rows, int outputs, int inputs, const LaunchOptions& options) {
  return VisitTile<kProduct>(rows, options.shared_bytes, [&]<class Tile>() {
    return PlanFor<Tile>(outputs, false, inputs, options.multiprocessors).blocks;
  });
}

}  // namespace

size_t SkinnyPartialFloats(int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * 2 * Rows64::kPartialFloats;
}

bool SupportsSkinnyLinear(int rows, int outputs, int inputs, const LaunchOptions& options) {
  return rows >= 1 && rows <= kMaxSkinnyRows && outputs >= 1 && inputs >= 8 && inputs % 8 == 0 &&
         options.shared_bytes >= kLeastShared;
}

SkinnyTileShape SkinnyTileOf(SkinnyProduct product, int rows, int shared_bytes) {
  const auto shape = [&]<class Tile>() {
    return SkinnyTileShape{Tile::kXRows, Tile::kHeight, Tile::kK, Tile::kStages,
                           Tile::kSharedBytes};
  };
  switch (product) {
    case SkinnyProduct::kQkv:
      return VisitTile<SkinnyProduct::kQkv>(rows, shared_bytes, shape);
    case SkinnyProduct::kGateUp:
      return VisitTile<SkinnyProduct::kGateUp>(rows, shared_bytes, shape);
    case SkinnyProduct::kLogits:
      return VisitTile<SkinnyProduct::kLogits>(rows, shared_bytes, shape);
    case SkinnyProduct::kResidual:
      break;
  }
  return VisitTile<SkinnyProduct::kResidual>(rows, shared_bytes, shape);
}

int ResidualSquareParts(int rows, int outputs, int inputs, const LaunchOptions& options) {
  return BlocksOf<SkinnyProduct::kResidual>(rows, outputs, inputs, options);
}

int LogitsBestParts(int rows, int vocab, int inputs, const LaunchOptions& options) {
  return BlocksOf<SkinnyProduct::kLogits>(rows, vocab, inputs, options);
}

cudaError_t SkinnyGateUp(const GateUpArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options) {
  return LaunchProduct<SkinnyProduct::kGateUp>(GateUpOp{args, args.inner}, scratch, options);
}

cudaError_t SkinnyQkv(const QkvArgs& args, const SkinnyScratch& scratch,
                      const LaunchOptions& options) {
  const int pairs = (args.heads + 2 * args.kv_heads) * args.head_dim / 2;
  return LaunchProduct<SkinnyProduct::kQkv>(QkvOp{args, pairs}, scratch, options);
}

cudaError_t SkinnyResidual(const ResidualArgs& args, const SkinnyScratch& scratch,
                           const LaunchOptions& options) {
  return LaunchProduct<SkinnyProduct::kResidual>(ResidualOp{args, args.outputs}, scratch, options);
}

cudaError_t SkinnyLogits(const LogitsArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options) {
  return LaunchProduct<SkinnyProduct::kLogits>(LogitsOp{args, args.vocab}, scratch, options);
}

}  // namespace tandem::engine::cuda
