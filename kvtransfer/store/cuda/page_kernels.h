// Kernels between a pool in device memory and memory of the host that the device reaches (pinned),
// or another pool that it reaches.
//
// They read and write the host's memory themselves, so that one launch moves any number of pages
// without a buffer on the device: the link to the host is the bottleneck, and a few warps fill it.
// Launchers allocate nothing and do not wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

#include "kvtransfer/store/staging_plan.h"

namespace tandem::kvtransfer::cuda {

// A warp's copy: enough loads under way for the latency of the link to the host.
inline constexpr size_t kPieceBytes = 4 << 10;

// pool + pool_offset <-> host + (buffered ? buffer_offset : host_offset), for each piece.
struct PieceCopyArgs {
  std::byte* pool = nullptr;
  std::byte* host = nullptr;
  const StagedPiece* pieces = nullptr;
  int num_pieces = 0;
  bool buffered = false;
  CopyDirection direction = CopyDirection::kFromPool;
};
cudaError_t CopyPieces(const PieceCopyArgs& args, cudaStream_t stream);

// A block of one layer, as a kernel reads it.
struct PlacedBlock {
  uint64_t offset = 0;  // KvPoolShape::BlockOffset
  int32_t layer = 0;
  int32_t unused = 0;
};

// K and V pages of some heads of some blocks, in the order [block][K|V][head].
struct PageRunArgs {
  const std::byte* pool = nullptr;
  const PlacedBlock* blocks = nullptr;
  int num_blocks = 0;
  int pool_heads = 0;       // in a block of the pool
  int pool_first_head = 0;  // number of the pool's head 0 in the model
  int head_begin = 0;       // numbers in the model
  int head_count = 0;
  uint32_t page_bytes = 0;      // a multiple of 16
  std::byte* to = nullptr;      // the pages one behind the other; null: they are only digested
  uint64_t* digests = nullptr;  // PageDigest() of each page
};
cudaError_t DigestPages(const PageRunArgs& args, cudaStream_t stream);

// Where pages lie in a pool.
struct PagePlaces {
  std::byte* base = nullptr;
  uint64_t layer_bytes = 0;
  uint64_t block_bytes = 0;  // of one layer
  int heads = 0;
  int first_head = 0;  // its number in the model
};
// Blocks of a pool that become blocks of another, and what a launch says of them.
inline constexpr int kMaxPairs = 440;  // what a launch's arguments can hold
// In device memory; all zero between launches, which come one after the other.
struct PeerCopyState {
  uint32_t stop = 0;
  uint32_t blocks_done = 0;  // of threads
  uint64_t digests[kMaxPairs] = {};
};
struct PeerCopyArgs {
  PagePlaces pool;
  PagePlaces peer;
  int layer_begin = 0;
  int layer_count = 0;
  int head_begin = 0;  // numbers in the model
  int head_count = 0;
  uint32_t page_bytes = 0;  // a multiple of 16
  // Little more is written once this is not `generation`: 4 KiB by each warp, and what all of them
  // write in the few microseconds until it is seen. Memory of the host.
  const uint64_t* grant = nullptr;
  uint64_t generation = 0;
  PeerCopyState* state = nullptr;
  // Memory of the host: set to 1 where the grant was found gone; XOR of PageDigest() by pair.
  uint32_t* revoked = nullptr;
  uint64_t* digests = nullptr;
  int num_pairs = 0;
  struct Pair {
    int32_t from;
    int32_t to;
  } pairs[kMaxPairs];
};
// So many blocks of threads copy, at most, and one more watches: enough for the card's memory, and
// a rest of the processors for whoever computes.
inline constexpr int kPeerCopyBlocks = 96;
cudaError_t CopyToPeer(const PeerCopyArgs& args, cudaStream_t stream);

}  // namespace tandem::kvtransfer::cuda
