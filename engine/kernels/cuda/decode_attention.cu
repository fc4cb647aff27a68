#include <type_traits>

#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/decode_attention_kernel.cuh"

namespace tandem::engine::cuda {
namespace {

// A thread block without work stays until the successor's blocks have come, one to each
// multiprocessor; else two of them would share the one it leaves and work at half the speed.
__device__ void Linger() {
  constexpr long long kCycles = 6000;
  const long long start = clock64();
  while (clock64() - start < kCycles) __nanosleep(200);
}

template <class Layout, int kDim>
__global__ __launch_bounds__(Layout::kThreads, 1) void DecodeAttentionKernel(
    const __grid_constant__ DecodeAttentionArgs args,
    const __grid_constant__ DecodeAttentionScratch scratch) {
  extern __shared__ __align__(128) unsigned char shared[];
  Attention<typename Layout::Kv, kDim, Layout::kWarps, Layout::kStages> attention(args, scratch,
                                                                                  shared);
  const bool has_work = attention.Begin();
  WaitForPredecessor();
  LetSuccessorStart();
  if (has_work) {
    attention.Finish();
  } else {
    attention.CountLaunch();
    Linger();
  }
}

// Rings by what the device has room for. As many bytes are on their way where a number takes one as
// where it takes two.
template <typename Kv, int kDim>
using LongLayout = AttentionLayout<Kv, kDim, 4, sizeof(Kv) == 1 ? 6 : 3>;
template <typename Kv, int kDim>
using ShortLayout = AttentionLayout<Kv, kDim, 4, sizeof(Kv) == 1 ? 4 : 2>;
// Twice the warps keep up with the memory where they make halves of what it brings, but leave no
// room for the thread blocks of a skinny product behind them, which would then come two to a
// multiprocessor: for more items than those take rows.
template <int kDim>
using ManyWarpsLayout = AttentionLayout<E4M3, kDim, 8, 3>;
constexpr int kFewItems = 8;

template <class Layout>
bool Fits(const LaunchOptions& options) {
  return Layout::SharedBytes(kMaxDecodeItems) <= options.shared_bytes;
}

template <class Layout, int kDim>
cudaError_t LaunchLayout(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                         const LaunchOptions& options) {
  auto kernel = DecodeAttentionKernel<Layout, kDim>;
  static PerDevice<cudaError_t> prepared;
  const cudaError_t refused = prepared.Get([&] {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                Layout::SharedBytes(kMaxDecodeItems));
  });
  if (refused != cudaSuccess) return refused;
  const int bytes = Layout::SharedBytes(args.num_items);
  return Launch(kernel, dim3(static_cast<unsigned>(options.multiprocessors)), Layout::kThreads,
                static_cast<size_t>(bytes), options, args, scratch);
}

template <typename Kv, int kDim>
cudaError_t LaunchDim(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                      const LaunchOptions& options) {
  if constexpr (std::is_same_v<Kv, E4M3>) {
    if (args.num_items > kFewItems && Fits<ManyWarpsLayout<kDim>>(options)) {
      return LaunchLayout<ManyWarpsLayout<kDim>, kDim>(args, scratch, options);
    }
  }
  if (Fits<LongLayout<Kv, kDim>>(options)) {
    return LaunchLayout<LongLayout<Kv, kDim>, kDim>(args, scratch, options);
  }
  return LaunchLayout<ShortLayout<Kv, kDim>, kDim>(args, scratch, options);
}

template <typename Kv>
cudaError_t LaunchPages(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                        const LaunchOptions& options) {
  if (args.head_dim == 128) return LaunchDim<Kv, 128>(args, scratch, options);
  return LaunchDim<Kv, 64>(args, scratch, options);
}

// Pages of both kinds.
template <int kDim>
bool FitsBoth(const LaunchOptions& options) {
  return Fits<ShortLayout<__nv_bfloat16, kDim>>(options) && Fits<ShortLayout<E4M3, kDim>>(options);
}

}  // namespace

size_t DecodeAttentionParts(int head_dim, int multiprocessors) {
  return static_cast<size_t>(multiprocessors) * 2 *
         static_cast<size_t>(AttentionPartSize(head_dim));
}

bool SupportsDecodeAttention(int num_items, int heads, int kv_heads, int head_dim, int block_size,
                             const LaunchOptions& options) {
  if (num_items < 1 || num_items > kMaxDecodeItems) return false;
  if (heads % kv_heads != 0 || heads / kv_heads > kAttentionGroup) return false;
  if (block_size % kAttentionTile != 0) return false;
  return (head_dim == 128 && FitsBoth<128>(options)) || (head_dim == 64 && FitsBoth<64>(options));
}

cudaError_t DecodeAttention(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                            const LaunchOptions& options) {
  if (!SupportsDecodeAttention(args.num_items, args.heads, args.kv_heads, args.head_dim,
                               args.block_size, options)) {
    return cudaErrorInvalidValue;
  }
  return args.fp8_kv ? LaunchPages<E4M3>(args, scratch, options)
                     : LaunchPages<__nv_bfloat16>(args, scratch, options);
}

}  // namespace tandem::engine::cuda
