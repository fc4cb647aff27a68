#include <algorithm>

#include "kvtransfer/store/cuda/page_kernels.h"

namespace tandem::kvtransfer::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kThreads = 32 * kWarpsPerBlock;
// Enough bytes under way for the link, and few enough warps to leave the processors to whoever
// computes.
constexpr int kMaxBlocks = 64;

int Grid(size_t warps) {
  const size_t blocks = (warps + kWarpsPerBlock - 1) / kWarpsPerBlock;
  return static_cast<int>(std::min<size_t>(std::max<size_t>(blocks, 1), kMaxBlocks));
}

// One warp's copy of 16-byte vectors; eight loads of a lane are under way at a time.
__device__ void CopyVectors(const std::byte* from, std::byte* to, size_t bytes, int lane) {
  constexpr int kUnroll = 8;
  const auto* source = reinterpret_cast<const uint4*>(from);
  auto* target = reinterpret_cast<uint4*>(to);
  const size_t count = bytes / sizeof(uint4);
  for (size_t begin = 0; begin < count; begin += kUnroll * 32) {
    uint4 values[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const size_t at = begin + i * 32 + lane;
      if (at < count) values[i] = source[at];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const size_t at = begin + i * 32 + lane;
      if (at < count) target[at] = values[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) CopyPiecesKernel(const PieceCopyArgs args) {
  const int lane = threadIdx.x % 32;
  const int stride = gridDim.x * kWarpsPerBlock;
  for (int i = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32; i < args.num_pieces; i += stride) {
    const StagedPiece piece = args.pieces[i];
    std::byte* pool = args.pool + piece.pool_offset;
    std::byte* host = args.host + (args.buffered ? piece.buffer_offset : piece.host_offset);
    const bool from_pool = args.direction == CopyDirection::kFromPool;
    const std::byte* from = from_pool ? pool : host;
    std::byte* to = from_pool ? host : pool;
    const uintptr_t all =
        reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | piece.bytes;
    if (all % sizeof(uint4) == 0) {
      CopyVectors(from, to, piece.bytes, lane);
    } else {
      for (size_t at = lane; at < piece.bytes; at += 32) to[at] = from[at];
    }
  }
}

// Everything below is the definition in page_digest.h, with a lane a thread.
constexpr uint64_t kStride = 0x9e3779b97f4a7c15ull;
constexpr uint32_t kStripeBytes = 256;

__device__ uint64_t Mix(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
  return h ^ (h >> 31);
}

__device__ uint64_t RotateLeft(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }

constexpr unsigned kAllLanes = 0xffffffffu;

// The digest from each lane's accumulator; lane 0 has it.
__device__ uint64_t Fold(uint64_t acc, uint32_t page_bytes, uint64_t place, int lane) {
  const uint64_t acc8 = __shfl_down_sync(kAllLanes, acc, 8);
  const uint64_t acc16 = __shfl_down_sync(kAllLanes, acc, 16);
  const uint64_t acc24 = __shfl_down_sync(kAllLanes, acc, 24);
  const uint64_t f = acc ^ RotateLeft(acc8, 13) ^ RotateLeft(acc16, 29) ^ RotateLeft(acc24, 47);
  uint64_t h = lane < 8 ? Mix(f + (lane + 1) * kStride) : 0;
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) h ^= __shfl_xor_sync(kAllLanes, h, offset);
  h ^= page_bytes;
  return Mix(h ^ (place * kStride));
}

__global__ void __launch_bounds__(kThreads) DigestPagesKernel(const PageRunArgs args) {
  constexpr int kUnroll = 16;  // stripes whose loads are under way at a time: 4 KiB of a page
  const int lane = threadIdx.x % 32;
  const int stride = gridDim.x * kWarpsPerBlock;
  const int pages = args.num_blocks * 2 * args.head_count;
  const uint64_t first_key = Mix((lane + 1) * kStride);
  for (int page = blockIdx.x * kWarpsPerBlock + threadIdx.x / 32; page < pages; page += stride) {
    const int block = page / (2 * args.head_count);
    const int kind = page / args.head_count % 2;
    const int head = args.head_begin + page % args.head_count;
    const PlacedBlock placed = args.blocks[block];
    const auto page_of_block =
        static_cast<uint64_t>(kind * args.pool_heads + head - args.pool_first_head);
    const std::byte* from = args.pool + placed.offset + page_of_block * args.page_bytes;
    std::byte* to =
        args.to == nullptr ? nullptr : args.to + static_cast<size_t>(page) * args.page_bytes;
    uint64_t acc = first_key;
    uint64_t key = first_key;
    for (uint32_t begin = 0; begin < args.page_bytes; begin += kUnroll * kStripeBytes) {
      uint64_t x[kUnroll];
#pragma unroll
      for (int s = 0; s < kUnroll; ++s) {
        const uint32_t at = begin + s * kStripeBytes + lane * 8;
        x[s] = at < args.page_bytes ? *reinterpret_cast<const uint64_t*>(from + at) : 0;
      }
#pragma unroll
      for (int s = 0; s < kUnroll; ++s) {
        const uint32_t at = begin + s * kStripeBytes + lane * 8;
        if (to != nullptr && at < args.page_bytes) *reinterpret_cast<uint64_t*>(to + at) = x[s];
        // Of a stripe that begins behind the page, nothing counts.
        const uint64_t neighbour = __shfl_xor_sync(kAllLanes, x[s], 1);
        if (begin + s * kStripeBytes < args.page_bytes) {
          const uint64_t y = x[s] ^ key;
          acc += (y & 0xffffffffu) * (y >> 32) + neighbour;
          key += kStride;
        }
      }
    }
    const uint64_t place = (static_cast<uint64_t>(placed.layer) << 32) |
                           (static_cast<uint64_t>(head) << 1) | static_cast<uint64_t>(kind);
    const uint64_t digest = Fold(acc, args.page_bytes, place, lane);
    if (lane == 0) args.digests[page] = digest;
  }
}

}  // namespace

cudaError_t CopyPieces(const PieceCopyArgs& args, cudaStream_t stream) {
  CopyPiecesKernel<<<Grid(static_cast<size_t>(args.num_pieces)), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t DigestPages(const PageRunArgs& args, cudaStream_t stream) {
  const size_t pages = size_t{2} * args.num_blocks * args.head_count;
  DigestPagesKernel<<<Grid(pages), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace tandem::kvtransfer::cuda
