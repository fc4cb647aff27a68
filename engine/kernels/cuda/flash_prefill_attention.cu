// FlashInfer's FA2 prefill kernel (Ye et al., 2025, arXiv:2501.01005) as FlashPrefillAttention.
//
// FlashInfer launches its kernel over a plan: arrays that name the item and the tile of each thread
// block, computed by the host and copied to the device before each step. Its device code alone is
// used here, below a kernel of our own in which each thread block finds its item and tile in the
// batch's own arrays. So nothing is planned, allocated or copied, and a launch can be captured in a
// graph.
#include <algorithm>

#include <flashinfer/attention/prefill.cuh>
#include <flashinfer/attention/variants.cuh>

#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/flash_prefill_attention.h"
#include "engine/kernels/cuda/item_of_row.cuh"
#include "engine/kernels/cuda/prefill_attention.h"
#include "engine/kernels/cuda/ptx.cuh"

// How FlashInfer's code widens what it reads of pages. Its own way for e4m3 makes 480 of NaN.
template <>
struct flashinfer::vec_cast<__nv_bfloat16, tandem::engine::cuda::E4M3> {
  template <size_t kCount>
  __device__ static void cast(__nv_bfloat16* to, const tandem::engine::cuda::E4M3* from) {
    static_assert(kCount % 2 == 0);
#pragma unroll
    for (size_t i = 0; i < kCount / 2; ++i) {
      reinterpret_cast<uint32_t*>(to)[i] =
          tandem::engine::cuda::BFloat16sOf(reinterpret_cast<const uint16_t*>(from)[i]);
    }
  }
};

namespace tandem::engine::cuda {
namespace {

// What FlashInfer's code reads of its parameters, under its names: one item. Kv: elements of pages.
template <typename Kv>
struct Params {
  using DTypeQ = __nv_bfloat16;
  using DTypeKV = Kv;
  using DTypeO = __nv_bfloat16;
  using IdType = int32_t;

  __device__ uint32_t get_qo_len(uint32_t) const { return static_cast<uint32_t>(q_indptr[1]); }
  __device__ uint32_t get_kv_len(uint32_t) const { return length; }

  __nv_bfloat16 *q, *o;
  flashinfer::paged_kv_t<Kv, int32_t> paged_kv;
  int32_t *q_indptr, *o_indptr, *request_indices, *qo_tile_indices, *kv_tile_indices;
  int32_t* kv_chunk_size_ptr;
  flashinfer::uint_fastdiv group_size;
  uint32_t length, q_stride_n, q_stride_h;
  float scale_log2;
  float* lse;  // of a part: log2 of its sum of exp2(score), by (row, part, head)
  bool partition_kv;
  bool* block_valid_mask = nullptr;
};

// Plain causal attention: no other mask, no window, no cap of the scores. Scores are scaled before
// their maximum is taken. FlashInfer's own variant scales within exp2(scale * score - scale *
// maximum), and so, as a fused multiply-add rounds once, for the old and the new maximum too: a
// step that brings a row nothing new would change the row's last bit.
struct Variant : flashinfer::AttentionVariantBase {
  static constexpr float sm_scale_log2 = 1;

  template <typename Params>
  __device__ Variant(const Params& params, uint32_t item, uint8_t*)
      : qo_len(params.get_qo_len(item)),
        kv_len(params.get_kv_len(item)),
        window_left(params.get_kv_len(item)) {}

  REGISTER_LOGITS_TRANSFORM(params, score, item, row, position, head, kv_head,
                            { return score * params.scale_log2; })

  uint32_t qo_len, kv_len, window_left;
};

// kRows: (row, query head of the KV head) pairs of a thread block, four warps of 16 or 32 each.
// kPositions: keys of a step.
template <typename Kv, int kDim, int kRows, int kPositions>
using Traits =
    flashinfer::KernelTraits<flashinfer::MaskMode::kCausal, kRows, kRows / 64, kPositions / 16,
                             kDim / 16, kDim / 16, 4, 1, flashinfer::PosEncodingMode::kNone,
                             __nv_bfloat16, Kv, __nv_bfloat16, float, int32_t, Variant>;

struct FlashArgs {
  PrefillAttentionArgs batch;
  // Divisors as multiplications, computed by the host.
  flashinfer::uint_fastdiv group, block_size;
  // A sequence's positions are cut into parts of part_length, `parts` at most; 1: not at all. Row r
  // of the batch, of the run that begins at row f, has its part k in
  // part_out[f * parts + (r - f) * n + k], where n is how many parts the run's sequence has.
  int parts = 1, part_length = 0;
  __nv_bfloat16* part_out = nullptr;  // [][heads][head_dim]
  float* part_sums = nullptr;         // [][heads], as Params::lse
};

// The tiles of item i have the slots SlotOf(i) .. SlotOf(i + 1) - 1, of which the last may be
// without a tile: rows between first_rows[i] and first_rows[i + 1] make no more tiles than that.
template <int kRows>
__device__ int SlotOf(const FlashArgs& args, int item) {
  const uint32_t pairs = static_cast<uint32_t>(__ldg(args.batch.first_rows + item)) *
                         static_cast<uint32_t>(args.group);
  return static_cast<int>(pairs / kRows) + item;
}

template <typename Traits>
__global__ __launch_bounds__(Traits::NUM_THREADS) void FlashPrefillKernel(
    const __grid_constant__ FlashArgs args) {
  constexpr int kRows = Traits::CTA_TILE_Q, kDim = Traits::HEAD_DIM_QK;
  using Kv = typename Traits::DTypeKV;
  const PrefillAttentionArgs& batch = args.batch;
  // Tiles at a sequence's end attend to most positions and so start first.
  const int slot = static_cast<int>(gridDim.y - 1 - blockIdx.y);
  int item = 0, end = batch.num_items;  // SlotOf(item) <= slot < SlotOf(end)
  while (end - item > 1) {
    const int middle = (item + end) / 2;
    if (SlotOf<kRows>(args, middle) <= slot) {
      item = middle;
    } else {
      end = middle;
    }
  }
  int tile = slot - SlotOf<kRows>(args, item);
  const int first_row = __ldg(batch.first_rows + item);
  const int rows = __ldg(batch.first_rows + item + 1) - first_row;
  const int start = __ldg(batch.starts + item);
  const bool has_tile = tile * kRows < rows * static_cast<int>(static_cast<uint32_t>(args.group));
  if (!has_tile || start < 0 || (batch.skip_single_rows && rows == 1)) {
    WaitForPredecessor();  // as ptx.cuh's rule says
    return;
  }

  const int length = start + rows, blocks = (length - 1) / batch.block_size + 1;
  const bool split = args.parts > 1;
  int part = split ? static_cast<int>(blockIdx.z) : 0;
  int part_length = split ? args.part_length : length;
  // The tile's last row, to see that it attends to something of this part.
  const int last_row = min(rows, static_cast<int>(((tile + 1) * kRows - 1) / args.group) + 1) - 1;
  if (part * part_length > start + last_row) {
    WaitForPredecessor();
    return;
  }

  // A batch of this item alone, in registers once the compiler has seen through the pointers.
  const int64_t half = static_cast<int64_t>(batch.kv_heads) * batch.block_size * kDim;
  int32_t zero = 0, first_part = split ? first_row * args.parts : first_row;
  int32_t rows_of[2] = {0, rows}, blocks_of[2] = {0, blocks};
  auto* kv = static_cast<Kv*>(const_cast<void*>(batch.kv));
  Params<Kv> params;
  params.q =
      const_cast<__nv_bfloat16*>(batch.q) + static_cast<int64_t>(first_row) * batch.heads * kDim;
  params.o = split ? args.part_out : batch.out;
  params.lse = split ? args.part_sums : nullptr;
  params.partition_kv = split;
  params.q_indptr = rows_of;
  params.o_indptr = &first_part;
  params.group_size = args.group;
  params.length = static_cast<uint32_t>(length);
  params.q_stride_n = static_cast<uint32_t>(batch.heads * kDim);
  params.q_stride_h = kDim;
  params.scale_log2 = batch.scale * flashinfer::math::log2e;
  params.request_indices = &zero;
  params.qo_tile_indices = &tile;
  params.kv_tile_indices = &part;
  params.kv_chunk_size_ptr = &part_length;
  params.paged_kv.page_size = args.block_size;
  params.paged_kv.num_heads = static_cast<uint32_t>(batch.kv_heads);
  params.paged_kv.head_dim = kDim;
  params.paged_kv.batch_size = 1;
  params.paged_kv.stride_page = static_cast<uint32_t>(2 * half);
  params.paged_kv.stride_n = kDim;
  params.paged_kv.stride_h = static_cast<uint32_t>(batch.block_size * kDim);
  params.paged_kv.k_data = kv;
  params.paged_kv.v_data = kv + half;
  params.paged_kv.indices = const_cast<int32_t*>(batch.blocks) + __ldg(batch.first_blocks + item);
  params.paged_kv.indptr = blocks_of;

  extern __shared__ __align__(128) unsigned char shared[];
  auto& storage = reinterpret_cast<typename Traits::SharedStorage&>(shared);
  // Its warps are rows of a two-dimensional block.
  const dim3 thread(threadIdx.x % 32, threadIdx.x / 32, 0);
  flashinfer::BatchPrefillWithPagedKVCacheDevice<Traits>(params, storage, thread, 0, blockIdx.x,
                                                         gridDim.x);
}

constexpr int kMergeWarps = 8;
constexpr int kMaxParts = 32;  // one to a lane

// A row's head to a warp: the parts' results, weighed by their sums, in the order of positions.
template <int kDim>
__global__ __launch_bounds__(kMergeWarps *
                             32) void MergePartsKernel(const __grid_constant__ FlashArgs args) {
  const PrefillAttentionArgs& batch = args.batch;
  const int row = blockIdx.x, lane = threadIdx.x % 32;
  const int head = static_cast<int>(blockIdx.y) * kMergeWarps + static_cast<int>(threadIdx.x) / 32;
  const int item = ItemOfRow(batch.first_rows, batch.num_items, row);
  const int first_row = __ldg(batch.first_rows + item);
  const int rows = __ldg(batch.first_rows + item + 1) - first_row;
  const int start = __ldg(batch.starts + item);
  WaitForPredecessor();
  LetSuccessorStart();
  if (head >= batch.heads || row >= first_row + rows || start < 0 ||
      (batch.skip_single_rows && rows == 1)) {
    return;
  }
  const int parts = (start + rows - 1) / args.part_length + 1;  // of the sequence
  const int seen = (start + row - first_row) / args.part_length + 1;
  const int64_t first =
      static_cast<int64_t>(first_row) * args.parts + static_cast<int64_t>(row - first_row) * parts;
  const float sum = lane < seen ? __ldcg(args.part_sums + (first + lane) * batch.heads + head)
                                : -flashinfer::math::inf;
  float most = sum;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
  }
  float weight = lane < seen ? exp2f(sum - most) : 0;
  weight /= WarpSum(weight);
  constexpr int kColumns = kDim / 32;  // of a lane
  float total[kColumns] = {};
  for (int part = 0; part < seen; ++part) {
    const float of_part = __shfl_sync(~0u, weight, part);
    const __nv_bfloat16* from =
        args.part_out + ((first + part) * batch.heads + head) * kDim + lane * kColumns;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      total[i] += of_part * __bfloat162float(__ldcg(from + i));
    }
  }
  __nv_bfloat16* to =
      batch.out + (static_cast<int64_t>(row) * batch.heads + head) * kDim + lane * kColumns;
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    *reinterpret_cast<uint32_t*>(to + i) = PackBFloat16(total[i], total[i + 1]);
  }
}

// Into how many parts positions are cut: so many that two thread blocks for each multiprocessor
// have work, that a part is worth a launch, and that the scratch of PrefillAttentionPartialFloats
// has room: 128 * (head_dim + 2) floats for each multiprocessor, of which a part of a row's head
// takes head_dim / 2 + 1.
int PartsOf(const PrefillAttentionArgs& args, int slots, int multiprocessors) {
  constexpr int kLeastPositions = 256;
  if (args.partial == nullptr || args.batch_invariant) return 1;
  return std::min({2 * multiprocessors / (slots * args.kv_heads),
                   2 * 128 * multiprocessors / (args.rows * args.heads),
                   args.max_length / kLeastPositions, kMaxParts});
}

template <typename Kv, int kDim, int kRows, int kPositions>
cudaError_t LaunchTiles(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  using KernelTraits = Traits<Kv, kDim, kRows, kPositions>;
  constexpr size_t kSharedBytes = sizeof(typename KernelTraits::SharedStorage);
  auto kernel = FlashPrefillKernel<KernelTraits>;
  static PerDevice<cudaError_t> prepared;
  const cudaError_t refused = prepared.Get([&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(kSharedBytes));
  });
  if (refused != cudaSuccess) return refused;
  const int group = args.heads / args.kv_heads;
  const int slots = args.rows * group / kRows + args.num_items;
  dim3 grid(static_cast<unsigned>(args.kv_heads), static_cast<unsigned>(slots));
  FlashArgs flash_args = {args, flashinfer::uint_fastdiv(static_cast<uint32_t>(group)),
                          flashinfer::uint_fastdiv(static_cast<uint32_t>(args.block_size))};
  const int parts = PartsOf(args, slots, options.multiprocessors);
  if (parts < 2) {
    return Launch(kernel, grid, KernelTraits::NUM_THREADS, kSharedBytes, options, flash_args);
  }
  flash_args.part_length = ((args.max_length - 1) / parts / kPositions + 1) * kPositions;
  flash_args.parts = (args.max_length - 1) / flash_args.part_length + 1;
  flash_args.part_sums = args.partial;
  const int64_t sums = static_cast<int64_t>(args.rows) * flash_args.parts * args.heads;
  flash_args.part_out = reinterpret_cast<__nv_bfloat16*>(args.partial + (sums + 3) / 4 * 4);
  grid.z = static_cast<unsigned>(flash_args.parts);
  const cudaError_t error =
      Launch(kernel, grid, KernelTraits::NUM_THREADS, kSharedBytes, options, flash_args);
  if (error != cudaSuccess) return error;
  const dim3 merge_grid(static_cast<unsigned>(args.rows),
                        static_cast<unsigned>((args.heads - 1) / kMergeWarps + 1));
  return Launch(MergePartsKernel<kDim>, merge_grid, kMergeWarps * 32, 0, options, flash_args);
}

template <int kDim, int kPositions>
cudaError_t LaunchSteps(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  const auto launch = [&]<typename Kv>(Kv) {
    // Tiles of 64 where the longest run does not fill one of 128.
    return args.max_item_rows * (args.heads / args.kv_heads) <= 64
               ? LaunchTiles<Kv, kDim, 64, kPositions>(args, options)
               : LaunchTiles<Kv, kDim, 128, kPositions>(args, options);
  };
  return args.fp8_kv ? launch(E4M3{}) : launch(__nv_bfloat16{});
}

}  // namespace

cudaError_t FlashPrefillAttention(const PrefillAttentionArgs& args, const LaunchOptions& options,
                                  int step) {
  if (args.num_items == 0 || args.rows == 0) return cudaSuccess;
  if (args.kv_heads < 1 || args.heads % args.kv_heads != 0) return cudaErrorInvalidValue;
  if (args.head_dim == 64 && step == 64) return LaunchSteps<64, 64>(args, options);
  if (args.head_dim == 128 && step == 64) return LaunchSteps<128, 64>(args, options);
  if (args.head_dim == 128 && step == 32) return LaunchSteps<128, 32>(args, options);
  return cudaErrorNotSupported;
}

cudaError_t FlashPrefillAttention(const PrefillAttentionArgs& args, const LaunchOptions& options) {
  static PerDevice<int> of_device;
  const int shared_bytes = of_device.Get([] {
    int device = 0, value = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    return value;
  });
  // So that two thread blocks share a multiprocessor: sm_86, sm_89 and sm_120 have 100 KB.
  const bool small = args.head_dim == 128 && shared_bytes < 128 * 1024;
  return FlashPrefillAttention(args, options, small ? 32 : 64);
}

}  // namespace tandem::engine::cuda
