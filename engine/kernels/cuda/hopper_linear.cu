#include <algorithm>
#include <cuda.h>

#include "engine/kernels/cuda/hopper_linear.h"
#include "engine/kernels/cuda/hopper_linear_ops.cuh"
#include "engine/kernels/cuda/hopper_matrix.h"
#include "engine/kernels/cuda/hopper_wide_linear.h"

namespace tandem::engine::cuda {
namespace {

using Rows64 = HopperTile<1, Team::kNone, 5>;
using Rows64Parts = HopperTile<1, Team::kParts, 5>;
using Rows128 = HopperTile<2, Team::kNone, 4>;
using Rows128Parts = HopperTile<2, Team::kParts, 4>;
using Rows256 = HopperTile<2, Team::kPair, 4>;

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

// Whole tiles are dealt out in rounds over the workers. What is left for a last round is cut:
//  - for pairs, into as many parts of K as there are workers for; all of a round are at the same
//    place of K, so that they share what L2 holds;
//  - for others, whose time is that of reading the weights, together with a round's worth of whole
//    tiles into equal ranges of chunks;
// unless putting parts together costs more than the idle multiprocessors.
template <class Tile>
HopperPlan PlanFor(int rows, int units, int inputs, const HopperScratch& scratch, int clusters,
                   int parts) {
  constexpr int kJoinChunks = Tile::kCluster > 1 ? 40 : 8;  // what joining costs, in chunks of K
  HopperPlan plan;
  plan.row_tiles = CeilDivide(rows, Tile::kRows * Tile::kCluster);
  plan.column_tiles = CeilDivide(units, Tile::kUnits);
  plan.chunks = CeilDivide(inputs, kChunk);
  plan.band = 16 / Tile::kCluster;
  plan.scratch = scratch;
  const int tiles = plan.row_tiles * plan.column_tiles;
  if (Tile::kParts) {
    plan.parts = parts;
    plan.workers = tiles;
    return plan;
  }
  plan.workers = std::min(clusters, tiles);
  plan.whole_tiles = tiles;
  const int left = tiles % clusters;
  const int idle_chunks = left == 0 ? 0 : plan.chunks * (clusters - left) / clusters;
  if (scratch.partial == nullptr || idle_chunks <= kJoinChunks) return plan;
  if (Tile::kCluster > 1) {
    plan.tail_parts = left * 4 <= clusters ? 4 : left * 2 <= clusters ? 2 : 0;
    if (plan.tail_parts > 0) {
      plan.whole_tiles = tiles - left;
      plan.workers = plan.whole_tiles > 0 ? clusters : left * plan.tail_parts;
    }
  } else {
    plan.split_tiles = tiles < clusters ? tiles : clusters + left;
    plan.workers = std::min(clusters, tiles * plan.chunks);
  }
  return plan;
}

// One thread block per multiprocessor, in clusters.
class Launcher {
 public:
  Launcher(int cluster, int shared_bytes, const LaunchOptions& options)
      : cluster_(cluster), most_(options.multiprocessors / cluster) {
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes_[0].val.clusterDim.y = 1;
    attributes_[0].val.clusterDim.z = 1;
    attributes_[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[1].val.programmaticStreamSerializationAllowed = 1;
    config_.gridDim = dim3(static_cast<unsigned>(most_ * cluster));
    config_.blockDim = dim3(kHopperThreads);
    config_.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config_.stream = options.stream;
    config_.attrs = attributes_;
    config_.numAttrs = options.overlap ? 2 : 1;
  }

  // How many clusters the device can hold at once: multiprocessors come in groups that need not be
  // a multiple of the cluster.
  template <class Kernel>
  int Resident(Kernel* kernel) const {
    cudaLaunchConfig_t config = config_;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) return 0;
    return std::min(clusters, most_);
  }

  template <class Op>
  cudaError_t Launch(void (*kernel)(CUtensorMap, CUtensorMap, Op, HopperPlan), int clusters,
                     const CUtensorMap& x, const CUtensorMap& weight, const Op& op,
                     const HopperPlan& plan) {
    config_.gridDim = dim3(static_cast<unsigned>(clusters * cluster_));
    return cudaLaunchKernelEx(&config_, kernel, x, weight, op, plan);
  }

 private:
  int cluster_, most_;
  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_ = {};
};

constexpr int kLeastChunks = 4;  // of a part

template <class Tile, class Op>
struct Prepared {
  Prepared(const LaunchOptions& options) {
    error = cudaFuncSetAttribute(HopperLinearKernel<Tile, Op>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    if (error != cudaSuccess) return;
    for (int size = 1; size <= kMostParts; ++size) {
      if (!Tile::kParts && size != Tile::kCluster) continue;
      resident[size] =
          Launcher(size, Tile::kSharedBytes, options).Resident(HopperLinearKernel<Tile, Op>);
    }
  }
  cudaError_t error;
  int resident[kMostParts + 1] = {};  // clusters of this size
};

// The same device for the whole life of a process.
template <class Tile, class Op>
const Prepared<Tile, Op>& Prepare(const LaunchOptions& options) {
  static const Prepared<Tile, Op> prepared(options);
  return prepared;
}

template <class Tile, class Op>
cudaError_t LaunchTile(const Op& op, int units, int weight_rows, const HopperScratch& scratch,
                       const LaunchOptions& options, int parts = 1) {
  const Prepared<Tile, Op>& prepared = Prepare<Tile, Op>(options);
  if (prepared.error != cudaSuccess) return prepared.error;
  CUtensorMap x, weight;
  cudaError_t error = EncodeMatrix(op.x, op.rows, op.inputs, Tile::kRows, &x);
  if (error == cudaSuccess) {
    error = EncodeMatrix(op.weight, weight_rows, op.inputs, kBoxRows, &weight);
  }
  if (error != cudaSuccess) return error;
  const int cluster = Tile::kParts ? parts : Tile::kCluster;
  if (prepared.resident[cluster] < 1) return cudaErrorInvalidConfiguration;
  HopperPlan plan =
      PlanFor<Tile>(op.rows, units, op.inputs, scratch, prepared.resident[cluster], parts);
  return Launcher(cluster, Tile::kSharedBytes, options)
      .Launch(HopperLinearKernel<Tile, Op>, plan.workers, x, weight, op, plan);
}

// In how many parts of K the tiles of a small product are computed, so that most multiprocessors
// have one: 1 if there are too many tiles for it.
template <class Tile, class Op>
int PartsFor(const Op& op, int units, const LaunchOptions& options) {
  const Prepared<Tile, Op>& prepared = Prepare<Tile, Op>(options);
  const int tiles = CeilDivide(op.rows, Tile::kRows) * CeilDivide(units, Tile::kUnits);
  const int most = std::min(kMostParts, CeilDivide(op.inputs, kChunk) / kLeastChunks);
  for (int parts = most; parts > 1; --parts) {
    if (tiles <= prepared.resident[parts]) return parts;
  }
  return 1;
}

template <class Whole, class Parts, class Op>
cudaError_t LaunchEither(const Op& op, int units, int weight_rows, const HopperScratch& scratch,
                         const LaunchOptions& options) {
  if (scratch.partial != nullptr) {
    const int parts = PartsFor<Parts>(op, units, options);
    if (parts > 1) {
      return LaunchTile<Parts>(op, units, weight_rows, scratch, options, parts);
    }
  }
  return LaunchTile<Whole>(op, units, weight_rows, scratch, options);
}

template <class Op>
cudaError_t LaunchProduct(const Op& op, int units, int weight_rows, const HopperScratch& scratch,
                          const LaunchOptions& options) {
  if (op.rows < 1 || op.inputs % 8 != 0) return cudaErrorInvalidValue;
  if (op.rows <= 64) {
    return LaunchEither<Rows64, Rows64Parts>(op, units, weight_rows, scratch, options);
  }
  // A pair of thread blocks reads the weights once for two tiles; not where one of the two would be
  // empty too often, nor where there is work for a few multiprocessors only.
  const int tiles = CeilDivide(op.rows, Rows128::kRows);
  const bool few = tiles * CeilDivide(units, Rows128::kUnits) * 2 <= options.multiprocessors;
  if (!few && (tiles % 2 == 0 || tiles > 16)) {
    return LaunchTile<Rows256>(op, units, weight_rows, scratch, options);
  }
  return LaunchEither<Rows128, Rows128Parts>(op, units, weight_rows, scratch, options);
}

}  // namespace

size_t HopperPartialFloats(int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * Rows128::kPartialFloats;
}

size_t HopperFlags(int multiprocessors) { return static_cast<size_t>(multiprocessors) * 4; }

bool HopperSupports(int outputs, int inputs, int head_dim) {
  return outputs % 8 == 0 && inputs % 8 == 0 &&
         (head_dim == 0 || head_dim == 64 || head_dim == 128);
}

cudaError_t HopperGateUp(const GateUpArgs& args, const HopperScratch& scratch,
                         const LaunchOptions& options) {
  if (args.inner % 8 != 0) return cudaErrorInvalidValue;
  if (args.rows >= kWideRows) return WideGateUp(args, options);
  return LaunchProduct(HopperGateUpOp{args}, CeilDivide(args.inner, kBoxRows), 2 * args.inner,
                       scratch, options);
}

cudaError_t HopperQkv(const QkvArgs& args, const HopperScratch& scratch,
                      const LaunchOptions& options) {
  if (args.rows >= kWideRows) return WideQkv(args, options);
  const int outputs = (args.heads + 2 * args.kv_heads) * args.head_dim;
  const int units = CeilDivide(outputs, kUnitRows);
  if (args.head_dim == 64) {
    return LaunchProduct(HopperQkvOp<64>{args}, units, outputs, scratch, options);
  }
  if (args.head_dim != 128) return cudaErrorInvalidValue;
  return LaunchProduct(HopperQkvOp<128>{args}, units, outputs, scratch, options);
}

cudaError_t HopperResidual(const ResidualArgs& args, const HopperScratch& scratch,
                           const LaunchOptions& options) {
  if (args.outputs % 8 != 0) return cudaErrorInvalidValue;
  if (args.rows >= kWideRows) return WideResidual(args, options);
  return LaunchProduct(HopperResidualOp{args}, CeilDivide(args.outputs, kUnitRows), args.outputs,
                       scratch, options);
}

cudaError_t HopperLogits(const LogitsArgs& args, const HopperScratch& scratch,
                         const LaunchOptions& options) {
  if (args.logits == nullptr) return cudaErrorInvalidValue;
  return LaunchProduct(HopperLogitsOp{args}, CeilDivide(args.vocab, kUnitRows), args.vocab, scratch,
                       options);
}

}  // namespace tandem::engine::cuda
