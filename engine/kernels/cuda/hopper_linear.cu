#include <algorithm>
#include <cuda.h>

#include "engine/kernels/cuda/hopper_linear.h"
#include "engine/kernels/cuda/hopper_linear_ops.cuh"
#include "engine/kernels/cuda/hopper_matrix.h"
#include "engine/kernels/cuda/hopper_wide_linear.h"

namespace tandem::engine::cuda {
namespace {

// Tiles of 256 rows of the weight, for any product. A last round is cut.
using Rows64 = HopperTile<TileShape{.rows = 64, .units = 2, .stages = 5}>;
using Rows128 = HopperTile<TileShape{.rows = 128, .units = 2, .stages = 4}>;
using Rows256 = HopperTile<TileShape{.rows = 128, .units = 2, .stages = 4, .high = 2}>;
// Of 288 rows, never cut: taken where they fill whole rounds of multiprocessors. 132 of them are
// the gate and up projections of Qwen2.5-7B, 528 its vocabulary.
using Even16 = HopperTile<TileShape{.rows = 16, .units = 2, .stages = 5, .unit = 144}>;
using Even64 = HopperTile<TileShape{.rows = 64, .units = 2, .stages = 5, .unit = 144}>;
using Even128 = HopperTile<TileShape{.rows = 128, .units = 2, .stages = 4, .unit = 144}>;
using Even256 = HopperTile<TileShape{.rows = 128, .units = 2, .stages = 4, .unit = 144, .high = 2}>;
// Of small products, each computed by a cluster. A part is short: a deep ring holds most of it, and
// a low number of parts is joined sooner than tiles twice as wide in twice as many.
using Parts16 = HopperTile<TileShape{.rows = 16, .units = 1, .stages = 12, .parts = true}>;
using Parts64 = HopperTile<TileShape{.rows = 64, .units = 1, .stages = 9, .parts = true}>;
using Parts128 = HopperTile<TileShape{.rows = 128, .units = 1, .stages = 7, .parts = true}>;
using Parts256 =
    HopperTile<TileShape{.rows = 128, .units = 1, .stages = 7, .high = 2, .parts = true}>;
using BroadParts128 = HopperTile<TileShape{.rows = 128, .units = 2, .stages = 4, .parts = true}>;

constexpr size_t kMostSharedBytes = 225 << 10;  // of a tile, and beside it a little

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

// Whole tiles are dealt out in rounds over the workers. What is left for a last round is cut:
//  - for pairs, into as many parts of K as there are workers for; all of a round are at the same
//    place of K, so that they share what L2 holds;
//  - for others, whose time is that of reading the weights, together with a round's worth of whole
//    tiles into equal ranges of chunks;
// unless putting parts together costs more than the idle multiprocessors.
template <class Tile>
HopperPlan PlanFor(int rows, int weight_rows, int inputs, const HopperScratch& scratch,
                   int clusters, int parts) {
  // What joining costs, in chunks of K.
  constexpr int kJoinChunks = Tile::kHigh > 1 ? 40 : 8;
  HopperPlan plan;
  plan.row_tiles = CeilDivide(rows, Tile::kRows * Tile::kHigh);
  plan.column_tiles = CeilDivide(weight_rows, Tile::kColumns);
  plan.chunks = CeilDivide(inputs, kChunk);
  plan.band = 16 / Tile::kHigh;
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
  if (Tile::kHigh > 1) {
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
template <class Tile>
class Launcher {
 public:
  Launcher(int parts, const LaunchOptions& options)
      : cluster_(Tile::kHigh * parts), most_(options.multiprocessors / cluster_) {
    attributes_[0].id = cudaLaunchAttributeClusterDimension;
    attributes_[0].val.clusterDim.x = static_cast<unsigned>(cluster_);
    attributes_[0].val.clusterDim.y = 1;
    attributes_[0].val.clusterDim.z = 1;
    attributes_[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[1].val.programmaticStreamSerializationAllowed = 1;
    config_.gridDim = dim3(static_cast<unsigned>(most_ * cluster_));
    config_.blockDim = dim3(Tile::kThreads);
    config_.dynamicSmemBytes = static_cast<size_t>(Tile::kSharedBytes);
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
    config.dynamicSmemBytes = kMostSharedBytes;  // no two thread blocks on one
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
// Tiles of 128 rows above each other up to which pairs of even ones are taken.
constexpr int kMostEvenRowTiles = 4;

template <class Tile, class Op>
struct Prepared {
  Prepared(const LaunchOptions& options) {
    error = cudaFuncSetAttribute(HopperLinearKernel<Tile, Op>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes);
    if (error != cudaSuccess) return;
    for (int parts = 1; parts <= (Tile::kParts ? Tile::kMostParts : 1); ++parts) {
      resident[parts] = Launcher<Tile>(parts, options).Resident(HopperLinearKernel<Tile, Op>);
    }
  }
  cudaError_t error;
  int resident[kMostParts + 1] = {};  // clusters of so many parts
};

template <class Tile, class Op>
const Prepared<Tile, Op>& Prepare(const LaunchOptions& options) {
  static PerDevice<Prepared<Tile, Op>> prepared;
  return prepared.Get([&] { return Prepared<Tile, Op>(options); });
}

template <class Tile, class Op>
cudaError_t LaunchTile(const Op& op, int weight_rows, const HopperScratch& scratch,
                       const LaunchOptions& options, int parts = 1) {
  const Prepared<Tile, Op>& prepared = Prepare<Tile, Op>(options);
  if (prepared.error != cudaSuccess) return prepared.error;
  CUtensorMap x, weight;
  cudaError_t error = EncodeMatrix(op.x, op.rows, op.inputs, Tile::kRows, &x);
  if (error == cudaSuccess) {
    error = EncodeMatrix(op.weight, weight_rows, op.inputs, Tile::kBoxRows, &weight);
  }
  if (error != cudaSuccess) return error;
  if (prepared.resident[parts] < 1) return cudaErrorInvalidConfiguration;
  HopperPlan plan =
      PlanFor<Tile>(op.rows, weight_rows, op.inputs, scratch, prepared.resident[parts], parts);
  return Launcher<Tile>(parts, options)
      .Launch(HopperLinearKernel<Tile, Op>, plan.workers, x, weight, op, plan);
}

template <class Tile, class Op>
int TilesOf(const Op& op, int weight_rows) {
  return CeilDivide(op.rows, Tile::kRows * Tile::kHigh) * CeilDivide(weight_rows, Tile::kColumns);
}

// In how many parts of K the tiles of a small product are computed, so that most multiprocessors
// have one: 1 if there are too many tiles for it.
template <class Tile, class Op>
int PartsFor(const Op& op, int weight_rows, const LaunchOptions& options) {
  const Prepared<Tile, Op>& prepared = Prepare<Tile, Op>(options);
  const int tiles = TilesOf<Tile>(op, weight_rows);
  const int most = std::min(Tile::kMostParts, CeilDivide(op.inputs, kChunk) / kLeastChunks);
  for (int parts = most; parts > 1; --parts) {
    if (tiles <= prepared.resident[parts]) return parts;
  }
  return 1;
}

// Whether tiles come in rounds of which the last is nearly full too.
template <class Tile, class Op>
bool FillsRounds(const Op& op, int weight_rows, const LaunchOptions& options) {
  const int clusters = Prepare<Tile, Op>(options).resident[1];
  const int tiles = TilesOf<Tile>(op, weight_rows);
  if (clusters < 1) return false;
  const int idle = CeilDivide(tiles, clusters) * clusters - tiles;
  return idle * 16 <= tiles;
}

// By the first of three kinds of tiles that suits the product.
template <class Parts, class Even, class Whole, class Op>
cudaError_t LaunchFirst(const Op& op, int weight_rows, const HopperScratch& scratch,
                        const LaunchOptions& options) {
  if (scratch.partial != nullptr) {
    const int parts = PartsFor<Parts>(op, weight_rows, options);
    if (parts > 1) return LaunchTile<Parts>(op, weight_rows, scratch, options, parts);
  }
  if constexpr (Op::kAnyUnit) {
    if (FillsRounds<Even>(op, weight_rows, options)) {
      return LaunchTile<Even>(op, weight_rows, scratch, options);
    }
  }
  return LaunchTile<Whole>(op, weight_rows, scratch, options);
}

// The plan: which tile for how many rows. Even tiles were not measured beyond 512.
template <class Op>
cudaError_t LaunchProduct(const Op& op, int weight_rows, const HopperScratch& scratch,
                          const LaunchOptions& options) {
  if (op.rows < 1 || op.inputs % 8 != 0) return cudaErrorInvalidValue;
  if (op.rows <= 16) {
    return LaunchFirst<Parts16, Even16, Rows64>(op, weight_rows, scratch, options);
  }
  if (op.rows <= 64) {
    return LaunchFirst<Parts64, Even64, Rows64>(op, weight_rows, scratch, options);
  }
  const int tiles = CeilDivide(op.rows, Rows128::kRows);
  if (tiles == 1) {
    return LaunchFirst<Parts128, Even128, Rows128>(op, weight_rows, scratch, options);
  }
  if (tiles == 2 && scratch.partial != nullptr) {
    const int parts = PartsFor<Parts256>(op, weight_rows, options);
    if (parts > 1) return LaunchTile<Parts256>(op, weight_rows, scratch, options, parts);
  }
  // A pair of thread blocks reads the weights once for two tiles; not where one of the two would be
  // empty too often, nor where there is work for a few multiprocessors only.
  const bool few = TilesOf<Rows128>(op, weight_rows) * 2 <= options.multiprocessors;
  if (few || (tiles % 2 == 1 && tiles <= 16)) {
    return LaunchFirst<BroadParts128, Even128, Rows128>(op, weight_rows, scratch, options);
  }
  if constexpr (Op::kAnyUnit) {
    if (tiles <= kMostEvenRowTiles && FillsRounds<Even256>(op, weight_rows, options)) {
      return LaunchTile<Even256>(op, weight_rows, scratch, options);
    }
  }
  return LaunchTile<Rows256>(op, weight_rows, scratch, options);
}

}  // namespace

size_t HopperPartialFloats(int multiprocessors) {
  return static_cast<size_t>(multiprocessors) *
         std::max(Rows128::kPartialFloats, Even128::kPartialFloats);
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
  return LaunchProduct(HopperGateUpOp{args}, 2 * args.inner, scratch, options);
}

cudaError_t HopperQkv(const QkvArgs& args, const HopperScratch& scratch,
                      const LaunchOptions& options) {
  if (args.rows >= kWideRows) return WideQkv(args, options);
  const int outputs = (args.heads + 2 * args.kv_heads) * args.head_dim;
  if (args.head_dim == 64) {
    return LaunchProduct(HopperQkvOp<64>{args}, outputs, scratch, options);
  }
  if (args.head_dim != 128) return cudaErrorInvalidValue;
  return LaunchProduct(HopperQkvOp<128>{args}, outputs, scratch, options);
}

cudaError_t HopperResidual(const ResidualArgs& args, const HopperScratch& scratch,
                           const LaunchOptions& options) {
  if (args.outputs % 8 != 0) return cudaErrorInvalidValue;
  if (args.rows >= kWideRows) return WideResidual(args, options);
  return LaunchProduct(HopperResidualOp{args}, args.outputs, scratch, options);
}

cudaError_t HopperLogits(const LogitsArgs& args, const HopperScratch& scratch,
                         const LaunchOptions& options) {
  if (args.logits == nullptr) return cudaErrorInvalidValue;
  return LaunchProduct(HopperLogitsOp{args}, args.vocab, scratch, options);
}

}  // namespace tandem::engine::cuda
