#include <algorithm>

#include "engine/kernels/cuda/skinny_linear.h"
#include "engine/kernels/cuda/skinny_linear_ops.cuh"

namespace tandem::engine::cuda {
namespace {

template <class Tile, class Op>
cudaError_t LaunchTile(const Op& op, const SkinnyScratch& scratch, const LaunchOptions& options) {
  auto kernel = SkinnyLinearKernel<Tile, Op>;
  static const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
  if (prepared != cudaSuccess) return prepared;
  const SkinnyPlan plan =
      PlanFor<Tile>(op.granules, Op::kPaired, op.inputs, options.multiprocessors);
  if (plan.blocks > kSkinnyCounters && Tile::kN > 16) return cudaErrorInvalidValue;
  return Launch(kernel, dim3(static_cast<unsigned>(plan.grid)), kSkinnyThreads, Tile::kSharedBytes,
                options, op, plan, scratch);
}

// Tiles by bucket. A stage is as high as the share of one of ~132 multiprocessors in the layer's
// outputs where that is small. The ring takes just under half of Hopper's shared memory, but nearly
// all of it for 64 rows, whose sums need more registers than half a multiprocessor has.
using Rows1 = SkinnyTile<8, 1, 32, 256, 6, 1>;
using Rows1Qkv = SkinnyTile<8, 1, 48, 256, 4, 1>;
using Rows8 = SkinnyTile<8, 8, 32, 256, 5, 1>;
using Rows8Qkv = SkinnyTile<8, 8, 48, 128, 7, 1>;
using Rows16 = SkinnyTile<16, 16, 32, 256, 4, 1>;
using Rows16Qkv = SkinnyTile<16, 16, 48, 128, 6, 1>;
using Rows16GateUp = SkinnyTile<16, 16, 64, 128, 5, 2>;
using Rows32 = SkinnyTile<32, 32, 64, 128, 4, 2>;
using Rows64 = SkinnyTile<64, 64, 128, 128, 4, 4>;

template <class T1, class T8, class T16, class Op>
cudaError_t LaunchBucket(const Op& op, const SkinnyScratch& scratch, const LaunchOptions& options) {
  if (op.rows < 1 || op.rows > kMaxSkinnyRows || op.inputs % 8 != 0) return cudaErrorInvalidValue;
  if (op.rows == 1) return LaunchTile<T1>(op, scratch, options);
  if (op.rows <= 8) return LaunchTile<T8>(op, scratch, options);
  if (op.rows <= 16) return LaunchTile<T16>(op, scratch, options);
  if (op.rows <= 32) return LaunchTile<Rows32>(op, scratch, options);
  return LaunchTile<Rows64>(op, scratch, options);
}

int PlainBlocks(int rows, int outputs, int inputs, int multiprocessors) {
  if (rows <= 16) return PlanFor<Rows16>(outputs, false, inputs, multiprocessors).blocks;
  if (rows <= 32) return PlanFor<Rows32>(outputs, false, inputs, multiprocessors).blocks;
  return PlanFor<Rows64>(outputs, false, inputs, multiprocessors).blocks;
}

}  // namespace

size_t SkinnyPartialFloats(int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * 2 * Rows64::kPartialFloats;
}

int ResidualSquareParts(int rows, int outputs, int inputs, int multiprocessors) {
  return PlainBlocks(rows, outputs, inputs, multiprocessors);
}

int LogitsBestParts(int rows, int vocab, int inputs, int multiprocessors) {
  return PlainBlocks(rows, vocab, inputs, multiprocessors);
}

cudaError_t SkinnyGateUp(const GateUpArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options) {
  return LaunchBucket<Rows1, Rows8, Rows16GateUp>(GateUpOp{args, args.inner}, scratch, options);
}

cudaError_t SkinnyQkv(const QkvArgs& args, const SkinnyScratch& scratch,
                      const LaunchOptions& options) {
  const int pairs = (args.heads + 2 * args.kv_heads) * args.head_dim / 2;
  return LaunchBucket<Rows1Qkv, Rows8Qkv, Rows16Qkv>(QkvOp{args, pairs}, scratch, options);
}

cudaError_t SkinnyResidual(const ResidualArgs& args, const SkinnyScratch& scratch,
                           const LaunchOptions& options) {
  return LaunchBucket<Rows1, Rows8, Rows16>(ResidualOp{args, args.outputs}, scratch, options);
}

cudaError_t SkinnyLogits(const LogitsArgs& args, const SkinnyScratch& scratch,
                         const LaunchOptions& options) {
  return LaunchBucket<Rows1, Rows8, Rows16>(LogitsOp{args, args.vocab}, scratch, options);
}

}  // namespace tandem::engine::cuda
