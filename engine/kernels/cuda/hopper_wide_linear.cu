#include <algorithm>
#include <cuda.h>

#include "engine/kernels/cuda/hopper_matrix.h"
#include "engine/kernels/cuda/hopper_wide_linear.h"
#include "engine/kernels/cuda/hopper_wide_linear_ops.cuh"

namespace tandem::engine::cuda {
namespace {

// Rows of activations that are walked through before the next columns: with them L2 holds what a
// round reads.
constexpr int kBandRows = 2048;

int CeilDivide(int a, int b) { return (a + b - 1) / b; }

// With a cluster's tiles one above the other, or side by side.
WidePlan PlanOf(bool beside, int rows, int units, int inputs, int clusters) {
  const int rows_each = WideTile::kRows * (beside ? 1 : WideTile::kCluster);
  const int units_each = WideTile::kUnits * (beside ? WideTile::kCluster : 1);
  WidePlan plan;
  plan.beside = beside;
  plan.row_tiles = CeilDivide(rows, rows_each);
  plan.column_tiles = CeilDivide(units, units_each);
  plan.chunks = CeilDivide(inputs, kChunk);
  plan.band = kBandRows / rows_each;
  const int tiles = plan.row_tiles * plan.column_tiles;
  const int left = tiles % clusters;
  const bool halved = left * 2 <= clusters;
  plan.whole_tiles = halved ? tiles - left : tiles;
  plan.clusters = std::min(clusters, halved ? tiles + left : tiles);
  return plan;
}

// How long a plan takes, in halves of a round.
int HalfRounds(const WidePlan& plan, int clusters) {
  const int halves = plan.row_tiles * plan.column_tiles - plan.whole_tiles;
  return CeilDivide(plan.whole_tiles, clusters) * 2 + (halves > 0 ? 1 : 0);
}

// Tiles come out more evenly in the one shape or in the other: 1,061 rows are five clusters high,
// of which half of one is empty, or nine.
WidePlan PlanFor(int rows, int units, int inputs, int clusters) {
  const WidePlan above = PlanOf(false, rows, units, inputs, clusters);
  const WidePlan beside = PlanOf(true, rows, units, inputs, clusters);
  return HalfRounds(beside, clusters) < HalfRounds(above, clusters) ? beside : above;
}

template <class Op>
class WideLauncher {
 public:
  static const WideLauncher& Get(const LaunchOptions& options) {
    static PerDevice<WideLauncher> launcher;
    return launcher.Get([&] { return WideLauncher(options); });
  }

  cudaError_t Launch(const Op& op, int units, int weight_rows, const LaunchOptions& options) const {
    if (op.rows < 1 || op.inputs % 8 != 0) return cudaErrorInvalidValue;
    if (error_ != cudaSuccess) return error_;
    if (clusters_ < 1) return cudaErrorInvalidConfiguration;
    const WidePlan plan = PlanFor(op.rows, units, op.inputs, clusters_);
    const int x_box = plan.beside ? WideTile::kRows / WideTile::kCluster : WideTile::kRows;
    CUtensorMap x, weight;
    cudaError_t error = EncodeMatrix(op.x, op.rows, op.inputs, x_box, &x);
    if (error == cudaSuccess) {
      error = EncodeMatrix(op.weight, weight_rows, op.inputs, kBoxRows, &weight);
    }
    if (error != cudaSuccess) return error;
    Config config(options, plan.clusters);
    return cudaLaunchKernelEx(&config.launch, HopperWideKernel<Op>, x, weight, op, plan);
  }

 private:
  static constexpr int kSharedBytes = WideTile::kSharedBytes + WideTile::kWarps * Op::kStagingBytes;

  // In clusters, with a thread block on each multiprocessor.
  struct Config {
    Config(const LaunchOptions& options, int clusters) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = WideTile::kCluster;
      attributes[0].val.clusterDim.y = 1;
      attributes[0].val.clusterDim.z = 1;
      attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[1].val.programmaticStreamSerializationAllowed = 1;
      launch.gridDim = dim3(static_cast<unsigned>(clusters * WideTile::kCluster));
      launch.blockDim = dim3(kWideThreads);
      launch.dynamicSmemBytes = kSharedBytes;
      launch.stream = options.stream;
      launch.attrs = attributes;
      launch.numAttrs = options.overlap ? 2 : 1;
    }
    Config(const Config&) = delete;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t launch = {};
  };

  explicit WideLauncher(const LaunchOptions& options) {
    error_ = cudaFuncSetAttribute(HopperWideKernel<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  kSharedBytes);
    if (error_ != cudaSuccess) return;
    // Multiprocessors come in groups that need not be a multiple of the cluster.
    Config config(options, options.multiprocessors / WideTile::kCluster);
    config.launch.numAttrs = 1;
    error_ = cudaOccupancyMaxActiveClusters(&clusters_, HopperWideKernel<Op>, &config.launch);
    clusters_ = std::min(clusters_, options.multiprocessors / WideTile::kCluster);
  }

  cudaError_t error_;
  int clusters_ = 0;  // that run at once
};

template <class Op>
cudaError_t LaunchWide(const Op& op, int units, int weight_rows, const LaunchOptions& options) {
  return WideLauncher<Op>::Get(options).Launch(op, units, weight_rows, options);
}

}  // namespace

cudaError_t WideGateUp(const GateUpArgs& args, const LaunchOptions& options) {
  WideGateUpOp op;
  static_cast<GateUpArgs&>(op) = args;
  const cudaError_t error =
      EncodeMatrix(args.out, args.rows, args.inner, WideGateUpOp::kStagedRows, &op.out_map);
  if (error != cudaSuccess) return error;
  return LaunchWide(op, CeilDivide(args.inner, kBoxRows), 2 * args.inner, options);
}

cudaError_t WideQkv(const QkvArgs& args, const LaunchOptions& options) {
  const int outputs = (args.heads + 2 * args.kv_heads) * args.head_dim;
  const int units = CeilDivide(outputs, kUnitRows);
  if (args.head_dim == 64) return LaunchWide(WideQkvOp<64>{args}, units, outputs, options);
  if (args.head_dim != 128) return cudaErrorInvalidValue;
  return LaunchWide(WideQkvOp<128>{args}, units, outputs, options);
}

cudaError_t WideResidual(const ResidualArgs& args, const LaunchOptions& options) {
  return LaunchWide(WideResidualOp{args}, CeilDivide(args.outputs, kUnitRows), args.outputs,
                    options);
}

}  // namespace tandem::engine::cuda
