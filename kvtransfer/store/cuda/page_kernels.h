// Kernels between a pool in device memory and memory of the host that the device reaches (pinned).
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
  uint32_t page_bytes = 0;      // a multiple of 8
  std::byte* to = nullptr;      // the pages one behind the other; null: they are only digested
  uint64_t* digests = nullptr;  // PageDigest() of each page
};
cudaError_t DigestPages(const PageRunArgs& args, cudaStream_t stream);

}  // namespace tandem::kvtransfer::cuda
