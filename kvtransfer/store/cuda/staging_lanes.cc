#include "kvtransfer/store/cuda/staging_lanes.h"

#include <cstring>
#include <limits>

#include "common/base/check.h"
#include "common/base/status.h"
#include "common/cuda/cuda_check.h"
#include "kvtransfer/store/page_digest.h"
#include "kvtransfer/store/staging_plan.h"

namespace tandem::kvtransfer::cuda {
namespace {

constexpr size_t kMaxPieces = 4096;  // of a launch
// From memory of the card, whose latency is small. As small as those from the host's, they take
// longer to list than to copy.
constexpr size_t kPieceOnCardBytes = 16 << 10;

}  // namespace

StagingLanes::Lease::Lease(StagingLanes* lanes) : lanes_(lanes) {
  TANDEM_CUDA_CHECK(cudaSetDevice(lanes_->device_));
  absl::MutexLock lock(&lanes_->mutex_);
  TANDEM_CHECK(!lanes_->free_.empty(), "more than {} copies at a time", kStagedDepth);
  lane_ = lanes_->free_.back();
  lanes_->free_.pop_back();
}

StagingLanes::Lease::~Lease() {
  cudaStreamSynchronize(lane_->stream);
  absl::MutexLock lock(&lanes_->mutex_);
  lanes_->free_.push_back(lane_);
}

void StagingLanes::Digests::Take(const Lease& lane) {
  // Pages are in the order [layer][block][K|V][head].
  std::span<const uint64_t> pages(lane->digests, layers_ * by_block_.size() * pages_per_block_);
  for (size_t layer = 0; layer < layers_; ++layer) {
    for (uint64_t& digest : by_block_) {
      digest ^= AllOf(pages.first(pages_per_block_));
      pages = pages.subspan(pages_per_block_);
    }
  }
}

absl::StatusOr<std::unique_ptr<StagingLanes>> StagingLanes::Open(const KvRegion& region, int device,
                                                                 size_t max_copy_bytes) {
  TANDEM_CUDA_CHECK(cudaSetDevice(device));
  std::unique_ptr<StagingLanes> opened(new StagingLanes(region, device));
  int least = 0;
  int greatest = 0;
  TANDEM_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  const size_t pages = max_copy_bytes / region.layout.PageBytes() + 1;
  const size_t block_bytes = (pages / 2 + 1) * sizeof(PlacedBlock);
  const size_t digest_bytes = pages * sizeof(uint64_t);
  const size_t piece_bytes = kMaxPieces * sizeof(StagedPiece);
  for (Lane& lane : opened->lanes_) {
    void* buffer = nullptr;
    void* tables = nullptr;
    const bool allocated = cudaMalloc(&buffer, max_copy_bytes) == cudaSuccess &&
                           cudaHostAlloc(&tables, piece_bytes + block_bytes + digest_bytes,
                                         cudaHostAllocPortable) == cudaSuccess;
    lane.buffer = static_cast<std::byte*>(buffer);
    lane.tables = static_cast<std::byte*>(tables);
    if (!allocated) {
      cudaGetLastError();
      return ResourceExhausted("a KV link needs {} bytes of the card's memory and {} pinned ones",
                               kStagedDepth * max_copy_bytes,
                               kStagedDepth * (piece_bytes + block_bytes + digest_bytes));
    }
    lane.pieces = reinterpret_cast<StagedPiece*>(lane.tables);
    lane.blocks = reinterpret_cast<PlacedBlock*>(lane.tables + piece_bytes);
    lane.digests = reinterpret_cast<uint64_t*>(lane.tables + piece_bytes + block_bytes);
    // Before the work of a long prefill that waits for a processor.
    TANDEM_CUDA_CHECK(cudaStreamCreateWithPriority(&lane.stream, cudaStreamNonBlocking, greatest));
    TANDEM_CUDA_CHECK(cudaEventCreateWithFlags(&lane.end, cudaEventDisableTiming));
    // A probe sends it before anything else has written it.
    TANDEM_CUDA_CHECK(cudaMemsetAsync(lane.buffer, 0, max_copy_bytes, lane.stream));
    absl::MutexLock lock(&opened->mutex_);
    opened->free_.push_back(&lane);
  }
  return opened;
}

StagingLanes::~StagingLanes() {
  cudaSetDevice(device_);
  for (const Lane& lane : lanes_) {
    if (lane.end != nullptr) cudaEventDestroy(lane.end);
    if (lane.stream != nullptr) cudaStreamDestroy(lane.stream);
    if (lane.tables != nullptr) cudaFreeHost(lane.tables);
    if (lane.buffer != nullptr) cudaFree(lane.buffer);
  }
}

void StagingLanes::Gather(const Lease& lane, const BlockRun& run, std::byte* to) const {
  size_t count = 0;
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (const int32_t block : run.source_blocks) {
      lane->blocks[count++] = {shape_.BlockOffset(layer, block), layer, 0};
    }
  }
  PageRunArgs args;
  args.pool = region_.base;
  args.blocks = lane->blocks;
  args.num_blocks = static_cast<int>(count);
  args.pool_heads = shape_.layout.num_kv_heads;
  args.pool_first_head = shape_.first_head;
  args.head_begin = run.heads.begin;
  args.head_count = run.heads.count;
  args.page_bytes = static_cast<uint32_t>(shape_.layout.PageBytes());
  args.to = to;
  args.digests = lane->digests;
  TANDEM_CUDA_CHECK(DigestPages(args, lane->stream));
}

void StagingLanes::Scatter(const Lease& lane, const std::byte* from,
                           std::span<const CopyPiece> pieces) const {
  TANDEM_CUDA_CHECK(cudaSetDevice(device_));
  StagingPlan plan(pieces, CopyDirection::kIntoPool,
                   {from == lane->buffer ? kPieceOnCardBytes : kPieceBytes, kMaxPieces,
                    std::numeric_limits<size_t>::max()});
  PieceCopyArgs args;
  args.pool = region_.base;
  args.host = const_cast<std::byte*>(from);  // only read
  args.pieces = lane->pieces;
  args.direction = CopyDirection::kIntoPool;
  while (true) {
    const std::vector<StagedPiece>& batch = plan.Next();
    if (batch.empty()) return;
    std::memcpy(lane->pieces, batch.data(), batch.size() * sizeof(StagedPiece));
    args.num_pieces = static_cast<int>(batch.size());
    TANDEM_CUDA_CHECK(CopyPieces(args, lane->stream));
    TANDEM_CUDA_CHECK(cudaStreamSynchronize(lane->stream));
  }
}

}  // namespace tandem::kvtransfer::cuda
