#include <algorithm>
#include <cuda.h>

#include "engine/kernels/cuda/hopper_prefill_attention_kernel.cuh"

namespace tandem::engine::cuda {
namespace {

using namespace hopper_attention;

// The bodies exist in sm_90a's code alone.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TANDEM_HOPPER
#endif

template <int kDim, int kTile>
__global__ __launch_bounds__(kThreads, 1) void HopperPrefillKernel(
    const __grid_constant__ PrefillAttentionArgs args, const __grid_constant__ CUtensorMap q_map,
    const __grid_constant__ CUtensorMap kv_map, int piece_positions) {
#ifdef TANDEM_HOPPER
  extern __shared__ __align__(128) unsigned char shared[];
  Attention<kDim, kTile>(args, &q_map, &kv_map, piece_positions, shared);
#endif
}

constexpr int kMergeThreads = 256;
constexpr int kMergeSharedBytes = sizeof(Schedule) + sizeof(ScheduleScratch);

template <int kDim, int kTile>
__global__ __launch_bounds__(kMergeThreads) void HopperPrefillMergeKernel(
    const __grid_constant__ PrefillAttentionArgs args, int blocks) {
#ifdef TANDEM_HOPPER
  extern __shared__ __align__(128) unsigned char shared[];
  Merge<kDim, kTile>(args, blocks, shared);
#endif
}

bool IsHopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
}

using EncodeFunction = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                    const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's, so that no program links libcuda.
EncodeFunction FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &result) != cudaSuccess ||
      result != cudaDriverEntryPointSuccess) {
    return nullptr;
  }
  return reinterpret_cast<EncodeFunction>(function);
}

// A map of a row-major [rows][columns] matrix in boxes of 64 columns, swizzled as wgmma reads them.
cudaError_t MakeMap(const __nv_bfloat16* base, int64_t rows, int columns, int box_rows,
                    CUtensorMap* map) {
  static const EncodeFunction encode = FindEncode();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * sizeof(__nv_bfloat16)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16*>(base), sizes,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <int kDim, int kTile>
cudaError_t LaunchShape(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  using L = Layout<kDim, kTile>;
  auto kernel = HopperPrefillKernel<kDim, kTile>;
  static const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, L::kSharedBytes);
  if (prepared != cudaSuccess) return prepared;

  const int64_t pool_rows =
      static_cast<int64_t>(args.num_pool_blocks) * 2 * args.kv_heads * args.block_size;
  if (pool_rows >= int64_t{1} << 31) return cudaErrorNotSupported;
  CUtensorMap q_map, kv_map;
  cudaError_t error = MakeMap(args.q, args.rows, args.heads * kDim, kUnitRows, &q_map);
  if (error != cudaSuccess) return error;
  int piece_positions = kMinPiece;
  while (piece_positions < 64 && args.block_size % (2 * piece_positions) == 0 &&
         kTile % (2 * piece_positions) == 0) {
    piece_positions *= 2;
  }
  error = MakeMap(args.kv, pool_rows, kDim, piece_positions, &kv_map);
  if (error != cudaSuccess) return error;

  // Units there are at most, and at least one run's.
  const int64_t most = (static_cast<int64_t>(args.rows) / kUnitRows + args.num_items) * args.heads;
  const int64_t least =
      static_cast<int64_t>((args.max_item_rows + kUnitRows - 1) / kUnitRows) * args.heads;
  const bool may_split = args.partial != nullptr && 2 * least <= options.multiprocessors;
  const int blocks = may_split ? options.multiprocessors
                               : static_cast<int>(std::min<int64_t>(most, options.multiprocessors));
  PrefillAttentionArgs kept = args;
  if (!may_split) kept.partial = nullptr;
  error = Launch(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, L::kSharedBytes, options,
                 kept, q_map, kv_map, piece_positions);
  if (error != cudaSuccess || !may_split) return error;
  return Launch(HopperPrefillMergeKernel<kDim, kTile>, dim3(static_cast<unsigned>(blocks)),
                kMergeThreads, kMergeSharedBytes, options, kept, blocks);
}

}  // namespace

size_t PrefillAttentionPartialFloats(int head_dim, int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * kUnitRows *
         static_cast<size_t>(head_dim + kPartialStride);
}

cudaError_t HopperPrefillAttention(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  if (args.rows < 1 || args.num_items < 1) return cudaSuccess;
  if (args.kv_heads < 1 || args.heads % args.kv_heads != 0 || args.block_size % kMinPiece != 0) {
    return cudaErrorInvalidValue;
  }
  if (!IsHopper()) return cudaErrorNotSupported;
  if (args.rows / kUnitRows + args.num_items > kMaxUnits) return cudaErrorNotSupported;
  if (args.head_dim == 128) return LaunchShape<128, 128>(args, options);
  if (args.head_dim == 64) return LaunchShape<64, 128>(args, options);
  return cudaErrorNotSupported;
}

}  // namespace tandem::engine::cuda
