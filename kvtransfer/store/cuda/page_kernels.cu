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

// What follows is the definition in page_digest.h.
constexpr uint64_t kStride = 0x9e3779b97f4a7c15ull;
constexpr uint32_t kStripeBytes = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ uint64_t Mix(uint64_t h) {
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
  return h ^ (h >> 31);
}

__device__ uint64_t RotateLeft(uint64_t x, int by) { return (x << by) | (x >> (64 - by)); }

__device__ uint64_t Product(uint64_t y) { return (y & 0xffffffffu) * (y >> 32); }

// Of the accumulators of word j, for j = 2 * lane (+ 1): f[j], for lanes below 4.
__device__ uint64_t FoldWords(uint64_t acc) {
  const uint64_t acc8 = __shfl_down_sync(kAllLanes, acc, 4);
  const uint64_t acc16 = __shfl_down_sync(kAllLanes, acc, 8);
  const uint64_t acc24 = __shfl_down_sync(kAllLanes, acc, 12);
  return acc ^ RotateLeft(acc8, 13) ^ RotateLeft(acc16, 29) ^ RotateLeft(acc24, 47);
}

struct Always {
  __device__ bool operator()() const { return true; }
};

// PageDigest() of a page; lane 0 has it. A lane takes two neighbouring words, half a warp a stripe.
// The page is copied to `to` on the way, unless that is null, as far as `writable` says so: it is
// asked for every 4 KiB, at the same time as they are loaded.
template <typename Writable>
__device__ uint64_t DigestPage(const std::byte* from, std::byte* to, uint32_t page_bytes,
                               uint64_t place, int lane, Writable writable) {
  constexpr int kUnroll = 8;  // vectors of a lane whose loads are under way: 4 KiB of a page
  const int half = lane / 16;
  const int word = lane % 16 * 2;
  const uint64_t key0 = Mix((word + 1) * kStride);
  const uint64_t key1 = Mix((word + 2) * kStride);
  uint64_t acc0 = half == 0 ? key0 : 0;  // of both halves together: key
  uint64_t acc1 = half == 0 ? key1 : 0;
  for (uint32_t begin = 0; begin < page_bytes; begin += kUnroll * 2 * kStripeBytes) {
    ulonglong2 x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t at = begin + (i * 32 + lane) * sizeof(ulonglong2);
      x[i] = at < page_bytes ? *reinterpret_cast<const ulonglong2*>(from + at) : ulonglong2{0, 0};
    }
    const bool write = to != nullptr && writable();
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const uint32_t at = begin + (i * 32 + lane) * sizeof(ulonglong2);
      if (write && at < page_bytes) *reinterpret_cast<ulonglong2*>(to + at) = x[i];
      // Of a stripe that begins behind the page, nothing counts.
      const uint32_t stripe = begin / kStripeBytes + 2 * i + half;
      if (stripe * kStripeBytes < page_bytes) {
        acc0 += Product(x[i].x ^ (key0 + stripe * kStride)) + x[i].y;
        acc1 += Product(x[i].y ^ (key1 + stripe * kStride)) + x[i].x;
      }
    }
  }
  acc0 += __shfl_xor_sync(kAllLanes, acc0, 16);
  acc1 += __shfl_xor_sync(kAllLanes, acc1, 16);
  const uint64_t f0 = FoldWords(acc0);
  const uint64_t f1 = FoldWords(acc1);
  uint64_t h = lane < 4 ? Mix(f0 + (word + 1) * kStride) ^ Mix(f1 + (word + 2) * kStride) : 0;
  h ^= __shfl_xor_sync(kAllLanes, h, 1);
  h ^= __shfl_xor_sync(kAllLanes, h, 2);
  h ^= page_bytes;
  return Mix(h ^ (place * kStride));
}

__device__ uint64_t Place(int layer, int kind, int head) {
  return (static_cast<uint64_t>(layer) << 32) | (static_cast<uint64_t>(head) << 1) |
         static_cast<uint64_t>(kind);
}

__global__ void __launch_bounds__(kThreads) DigestPagesKernel(const PageRunArgs args) {
  const int lane = threadIdx.x % 32;
  const int stride = gridDim.x * kWarpsPerBlock;
  const int pages = args.num_blocks * 2 * args.head_count;
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
    const uint64_t digest =
        DigestPage(from, to, args.page_bytes, Place(placed.layer, kind, head), lane, Always());
    if (lane == 0) args.digests[page] = digest;
  }
}

constexpr int kPeerThreads = 512;
constexpr int kPeerWarps = kPeerThreads / 32;

__device__ std::byte* PageAt(const PagePlaces& places, int layer, int block, int kind, int head,
                             uint32_t page_bytes) {
  const auto page = static_cast<uint64_t>(kind * places.heads + head - places.first_head);
  return places.base + layer * places.layer_bytes + block * places.block_bytes + page * page_bytes;
}

// Reads `word` where it lies: other blocks, or the host, write it meanwhile.
template <typename T>
__device__ T Look(const T* word) {
  return *static_cast<const volatile T*>(word);
}

// The first block looks at the grant for all of them: looks of many blocks at one word of the
// host's memory come one after the other, about a microsecond each. It reports when the others are
// done, and leaves the state as it was.
__device__ void WatchGrant(const PeerCopyArgs& args) {
  __shared__ volatile bool over;
  __shared__ bool gone;
  PeerCopyState* const state = args.state;
  if (threadIdx.x == 0) over = gone = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    while (Look(&state->blocks_done) != gridDim.x - 1) {
    }
    over = true;
    __threadfence();
  } else if (threadIdx.x == 32) {  // another warp's
    while (!over && !gone) {
      gone = Look(args.grant) != args.generation;
      if (gone) *static_cast<volatile uint32_t*>(&state->stop) = 1;
      __nanosleep(1000);  // or else the end waits for the last look
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && gone) *args.revoked = 1;
  for (int i = threadIdx.x; i < args.num_pairs; i += kPeerThreads) {
    args.digests[i] = Look(&state->digests[i]);
    state->digests[i] = 0;
  }
  if (threadIdx.x == 0) state->stop = state->blocks_done = 0;
}

// A warp a page.
__global__ void __launch_bounds__(kPeerThreads)
    CopyToPeerKernel(const __grid_constant__ PeerCopyArgs args) {
  if (blockIdx.x == 0) {
    WatchGrant(args);
    return;
  }
  PeerCopyState* const state = args.state;
  const int lane = threadIdx.x % 32;
  const int per_block = 2 * args.head_count;
  const int pages = args.layer_count * args.num_pairs * per_block;
  const int stride = (gridDim.x - 1) * kPeerWarps;
  bool stopped = false;
  const auto writable = [&] {
    stopped = __any_sync(kAllLanes, stopped || Look(&state->stop) != 0);
    return !stopped;
  };
  for (int page = (blockIdx.x - 1) * kPeerWarps + threadIdx.x / 32; page < pages && !stopped;
       page += stride) {
    const int block = page / per_block;  // counted over the layers
    const int layer = args.layer_begin + block / args.num_pairs;
    const int pair = block % args.num_pairs;
    const int kind = page / args.head_count % 2;
    const int head = args.head_begin + page % args.head_count;
    const auto [from, to] = args.pairs[pair];
    const uint64_t digest = DigestPage(PageAt(args.pool, layer, from, kind, head, args.page_bytes),
                                       PageAt(args.peer, layer, to, kind, head, args.page_bytes),
                                       args.page_bytes, Place(layer, kind, head), lane, writable);
    if (lane == 0) {
      atomicXor(reinterpret_cast<unsigned long long*>(&state->digests[pair]), digest);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&state->blocks_done, 1);
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

cudaError_t CopyToPeer(const PeerCopyArgs& args, cudaStream_t stream) {
  const int pages = args.layer_count * args.num_pairs * 2 * args.head_count;
  const int workers = std::min((pages + kPeerWarps - 1) / kPeerWarps, kPeerCopyBlocks);
  CopyToPeerKernel<<<workers + 1, kPeerThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace tandem::kvtransfer::cuda
