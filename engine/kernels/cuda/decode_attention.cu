#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/decode_attention_kernel.cuh"

namespace tandem::engine::cuda {
namespace {

// Tiles in a warp's ring: as many as the device has room for.
constexpr int kStages = 3, kFewStages = 2;

// A thread block without work stays until the successor's blocks have come, one to each
// multiprocessor; else two of them would share the one it leaves and work at half the speed.
__device__ void Linger() {
  constexpr long long kCycles = 6000;
  const long long start = clock64();
  while (clock64() - start < kCycles) __nanosleep(200);
}

template <int kDim, int kStages>
__global__ __launch_bounds__(kAttentionThreads, 1) void DecodeAttentionKernel(
    const __grid_constant__ DecodeAttentionArgs args,
    const __grid_constant__ DecodeAttentionScratch scratch) {
  extern __shared__ __align__(128) unsigned char shared[];
  Attention<kDim, kStages> attention(args, scratch, shared);
  const bool has_work = attention.Begin();
  WaitForPredecessor();
  LetSuccessorStart();
  if (has_work) {
    attention.Finish();
  } else {
    Linger();
  }
}

template <int kDim, int kStages>
int SharedBytes(int num_items, const LaunchOptions& options) {
  return AttentionLayout<kDim, kStages>::SharedBytes(num_items, options.multiprocessors);
}

template <int kDim, int kStages>
cudaError_t LaunchStages(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                         const LaunchOptions& options) {
  auto kernel = DecodeAttentionKernel<kDim, kStages>;
  static const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           SharedBytes<kDim, kStages>(kMaxDecodeItems, options));
  if (prepared != cudaSuccess) return prepared;
  return Launch(kernel, dim3(static_cast<unsigned>(options.multiprocessors)), kAttentionThreads,
                static_cast<size_t>(SharedBytes<kDim, kStages>(args.num_items, options)), options,
                args, scratch);
}

template <int kDim>
cudaError_t LaunchDim(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                      const LaunchOptions& options) {
  if (SharedBytes<kDim, kStages>(kMaxDecodeItems, options) <= options.shared_bytes) {
    return LaunchStages<kDim, kStages>(args, scratch, options);
  }
  return LaunchStages<kDim, kFewStages>(args, scratch, options);
}

}  // namespace

size_t DecodeAttentionPartialFloats(int head_dim, int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * 2 *
         static_cast<size_t>(AttentionPartialFloats(head_dim));
}

bool SupportsDecodeAttention(int num_items, int heads, int kv_heads, int head_dim, int block_size,
                             const LaunchOptions& options) {
  if (num_items < 1 || num_items > kMaxDecodeItems) return false;
  if (heads % kv_heads != 0 || heads / kv_heads > kAttentionGroup) return false;
  if (block_size % kAttentionTile != 0) return false;
  const int bytes = head_dim == 128  ? SharedBytes<128, kFewStages>(kMaxDecodeItems, options)
                    : head_dim == 64 ? SharedBytes<64, kFewStages>(kMaxDecodeItems, options)
                                     : options.shared_bytes + 1;
  return bytes <= options.shared_bytes;
}

cudaError_t DecodeAttention(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                            const LaunchOptions& options) {
  if (!SupportsDecodeAttention(args.num_items, args.heads, args.kv_heads, args.head_dim,
                               args.block_size, options)) {
    return cudaErrorInvalidValue;
  }
  if (args.head_dim == 128) return LaunchDim<128>(args, scratch, options);
  return LaunchDim<64>(args, scratch, options);
}

}  // namespace tandem::engine::cuda
