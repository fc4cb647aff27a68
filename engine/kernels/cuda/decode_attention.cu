#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/decode_attention_kernel.cuh"

namespace tandem::engine::cuda {
namespace {

constexpr int kStages = 3;

// A thread block without work stays until the successor's blocks have come, one to each
// multiprocessor; else two of them would share the one it leaves and work at half the speed.
__device__ void Linger() {
  constexpr long long kCycles = 6000;
  const long long start = clock64();
  while (clock64() - start < kCycles) __nanosleep(200);
}

template <int kDim>
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

template <int kDim>
cudaError_t LaunchDim(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                      const LaunchOptions& options) {
  using Layout = AttentionLayout<kDim, kStages>;
  auto kernel = DecodeAttentionKernel<kDim>;
  static const cudaError_t prepared = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Layout::kSharedBytes);
  if (prepared != cudaSuccess) return prepared;
  return Launch(kernel, dim3(static_cast<unsigned>(options.multiprocessors)), kAttentionThreads,
                Layout::kSharedBytes, options, args, scratch);
}

}  // namespace

size_t DecodeAttentionPartialFloats(int head_dim, int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * 2 *
         static_cast<size_t>(AttentionPartialFloats(head_dim));
}

cudaError_t DecodeAttention(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                            const LaunchOptions& options) {
  if (args.rows < 1 || args.rows > kMaxDecodeRows || args.heads % args.kv_heads != 0 ||
      args.heads / args.kv_heads > kAttentionGroup || args.block_size % kAttentionTile != 0) {
    return cudaErrorInvalidValue;
  }
  if (args.head_dim == 128) return LaunchDim<128>(args, scratch, options);
  if (args.head_dim == 64) return LaunchDim<64>(args, scratch, options);
  return cudaErrorInvalidValue;
}

}  // namespace tandem::engine::cuda
