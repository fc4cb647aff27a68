#include <algorithm>
#include <array>
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
    const __grid_constant__ KernelArgs args, const __grid_constant__ CUtensorMap q_map,
    const __grid_constant__ CUtensorMap kv_map) {
#ifdef TANDEM_HOPPER
  extern __shared__ __align__(128) unsigned char shared[];
  Attention<kDim, kTile>(args, &q_map, &kv_map, shared);
#endif
}

constexpr int kAddThreads = 512;
constexpr int kAddSharedBytes = sizeof(WorkList) + sizeof(WorkListScratch);

template <int kDim, int kTile>
__global__ __launch_bounds__(kAddThreads) void HopperPrefillAddKernel(
    const __grid_constant__ KernelArgs args) {
#ifdef TANDEM_HOPPER
  extern __shared__ __align__(128) unsigned char shared[];
  AddParts<kDim, kTile>(args, shared);
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

// A map of a dense row-major tensor, sizes from the innermost, in boxes of 64 columns of it,
// swizzled as wgmma reads them.
template <int kRank>
cudaError_t MakeMap(const void* base, const std::array<int64_t, kRank>& sizes,
                    const std::array<int, kRank>& box, CUtensorMap* map) {
  static const EncodeFunction encode = FindEncode();
  if (encode == nullptr) return cudaErrorNotSupported;
  cuuint64_t extents[kRank], strides[kRank] = {sizeof(__nv_bfloat16)};
  cuuint32_t boxes[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    extents[i] = static_cast<cuuint64_t>(sizes[i]);
    if (i > 0) strides[i] = strides[i - 1] * extents[i - 1];
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
  }
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank, const_cast<void*>(base), extents,
             strides + 1, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Units that the longest run of the batch is cut into, if `pack` heads share one.
int64_t UnitsOfLongest(const PrefillAttentionArgs& args, int pack) {
  return DivideUp(args.max_item_rows, kUnitRows / pack) * (args.heads / pack);
}

template <int kDim, int kTile>
cudaError_t LaunchShape(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  using L = Layout<kDim, kTile>;
  auto kernel = HopperPrefillKernel<kDim, kTile>;
  static PerDevice<cudaError_t> prepared;
  const cudaError_t refused = prepared.Get([&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                L::kSharedBytes);
  });
  if (refused != cudaSuccess) return refused;

  KernelArgs kept{args};
  const int group = args.heads / args.kv_heads;
  if (group <= kUnitRows && UnitsOfLongest(args, group) < UnitsOfLongest(args, 1) &&
      args.rows / (kUnitRows / group) + args.num_items <= kMaxRuns) {
    kept.pack = group;
  }
  kept.unit_queries = kUnitRows / kept.pack;
  kept.group_queries = kGroupRows / kept.pack;
  kept.exponent_scale = args.scale * 1.44269504088896341f;
  kept.score_scale = 1 / kept.exponent_scale;
  // Twice L2 and more: the order costs a little balance.
  constexpr int64_t kFarPages = int64_t{128} << 20;
  kept.unit_heads = args.heads / kept.pack;
  const bool far = int64_t{4} * args.max_length * args.kv_heads * kDim > kFarPages;
  kept.round_heads = far ? kept.unit_heads / args.kv_heads : kept.unit_heads;
  while (kept.piece_positions < 64 && args.block_size % (2 * kept.piece_positions) == 0 &&
         kTile % (2 * kept.piece_positions) == 0) {
    kept.piece_positions *= 2;
  }

  const int64_t pool_rows =
      static_cast<int64_t>(args.num_pool_blocks) * 2 * args.kv_heads * args.block_size;
  if (pool_rows >= int64_t{1} << 31) return cudaErrorNotSupported;
  CUtensorMap q_map, kv_map;
  cudaError_t error =
      MakeMap<3>(args.q, {kDim, args.heads, args.rows}, {64, kept.pack, kept.unit_queries}, &q_map);
  if (error != cudaSuccess) return error;
  error = MakeMap<2>(args.kv, {kDim, pool_rows}, {64, kept.piece_positions}, &kv_map);
  if (error != cudaSuccess) return error;

  // Units there are at most, and at least.
  const int64_t most = (static_cast<int64_t>(args.rows) / kept.unit_queries + args.num_items) *
                       (args.heads / kept.pack);
  const int64_t least = UnitsOfLongest(args, kept.pack);
  kept.thread_blocks = options.multiprocessors;
  kept.part_rows = std::min(kUnitRows, args.max_item_rows * kept.pack);
  kept.room = options.multiprocessors * kUnitRows / kept.part_rows;
  if (args.batch_invariant) {
    kept.may_part = args.max_length > kCutPositions &&
                    DivideUp(args.max_length, kCutPositions) * least <= kept.room;
  } else {
    // A unit too long for its thread block is shared by a few with its like, by many if it is
    // alone.
    constexpr int kRounds = 4;
    kept.may_part = args.partial != nullptr && 2 * least <= kept.thread_blocks;
    kept.may_even = args.partial != nullptr && args.flags != nullptr && !kept.may_part &&
                    most <= kRounds * kept.thread_blocks;
  }
  if (!kept.may_part && !kept.may_even) {
    kept.thread_blocks = static_cast<int>(std::min<int64_t>(most, kept.thread_blocks));
  }
  const dim3 blocks(static_cast<unsigned>(kept.thread_blocks));
  error = Launch(kernel, blocks, kThreads, L::kSharedBytes, options, kept, q_map, kv_map);
  if (error != cudaSuccess || !kept.may_part) return error;
  return Launch(HopperPrefillAddKernel<kDim, kTile>, blocks, kAddThreads, kAddSharedBytes, options,
                kept);
}

}  // namespace

size_t PrefillAttentionPartialFloats(int head_dim, int multiprocessors) {
  const int place = head_dim <= 64 ? kPlaceFloats<64> : kPlaceFloats<128>;
  return static_cast<size_t>(multiprocessors) *
         static_cast<size_t>(place + kUnitRows * (head_dim + kPartHeader));
}

size_t PrefillAttentionFlags(int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * kWarpsOfPlace;
}

cudaError_t HopperPrefillAttention(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  if (args.rows < 1 || args.num_items < 1) return cudaSuccess;
  if (args.batch_invariant && args.partial == nullptr) return cudaErrorInvalidValue;
  if (args.kv_heads < 1 || args.heads % args.kv_heads != 0 || args.block_size % kMinPiece != 0) {
    return cudaErrorInvalidValue;
  }
  if (args.fp8_kv || !IsHopper()) return cudaErrorNotSupported;
  if (args.rows / kUnitRows + args.num_items > kMaxRuns) return cudaErrorNotSupported;
  if (args.head_dim == 128) return LaunchShape<128, 128>(args, options);
  if (args.head_dim == 64) return LaunchShape<64, 128>(args, options);
  return cudaErrorNotSupported;
}

}  // namespace tandem::engine::cuda
