#include "kvtransfer/store/cuda/device_store.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "common/base/status.h"
#include "common/cuda/cuda_check.h"
#include "kvtransfer/store/cuda/device_peer.h"
#include "kvtransfer/store/cuda/device_window.h"
#include "kvtransfer/store/cuda/page_kernels.h"
#include "kvtransfer/store/staging_plan.h"
#ifdef TANDEM_NCCL
#include "kvtransfer/store/cuda/nccl_fifo.h"
#endif

namespace tandem::kvtransfer::cuda {
namespace {

constexpr size_t kKeepPinnedBytes = size_t{64} << 20;

std::byte* AllocatePinned(size_t bytes) {
  void* data = nullptr;
  // Portable and mapped: at the same address for the host and for every card.
  const cudaError_t error = cudaHostAlloc(&data, bytes, cudaHostAllocPortable);
  if (error == cudaSuccess) return static_cast<std::byte*>(data);
  cudaGetLastError();  // not an error of whoever asks next
  return nullptr;
}

}  // namespace

// Pinned buffers by size. Outlives its store while a buffer does.
class DeviceStore::PinnedCache : public std::enable_shared_from_this<PinnedCache> {
 public:
  explicit PinnedCache(int device) : device_(device) {}
  ~PinnedCache() {
    for (const auto& [bytes, data] : idle_) cudaFreeHost(data);
  }

  std::shared_ptr<std::byte[]> Take(size_t bytes) {
    std::byte* data = nullptr;
    {
      absl::MutexLock lock(&mutex_);
      if (const auto it = idle_.find(bytes); it != idle_.end()) {
        data = it->second;
        idle_.erase(it);
        idle_bytes_ -= bytes;
      }
    }
    if (data == nullptr) {
      TANDEM_CUDA_CHECK(cudaSetDevice(device_));
      data = AllocatePinned(bytes);
    }
    // Without pinned memory it is slower, not wrong: copies go through a slot's buffer then.
    if (data == nullptr) return std::make_shared_for_overwrite<std::byte[]>(bytes);
    return {data, [self = shared_from_this(), bytes](std::byte* p) { self->Give(p, bytes); }};
  }

 private:
  void Give(std::byte* data, size_t bytes) {
    {
      absl::MutexLock lock(&mutex_);
      if (idle_bytes_ + bytes <= kKeepPinnedBytes) {
        idle_.emplace(bytes, data);
        idle_bytes_ += bytes;
        return;
      }
    }
    cudaFreeHost(data);
  }

  const int device_;
  absl::Mutex mutex_;
  std::multimap<size_t, std::byte*> idle_ ABSL_GUARDED_BY(mutex_);
  size_t idle_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

class DeviceStore::SlotLease {
 public:
  explicit SlotLease(const DeviceStore* store) : store_(store) {
    TANDEM_CUDA_CHECK(cudaSetDevice(store_->device_));
    absl::MutexLock lock(&store_->mutex_);
    const auto free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(store_->mutex_) {
      return !store_->free_.empty();
    };
    store_->mutex_.Await(absl::Condition(&free));
    slot_ = store_->free_.back();
    store_->free_.pop_back();
  }
  ~SlotLease() {
    absl::MutexLock lock(&store_->mutex_);
    store_->free_.push_back(slot_);
  }
  SlotLease(const SlotLease&) = delete;

  const Slot& operator*() const { return *slot_; }
  const Slot* operator->() const { return slot_; }

 private:
  const DeviceStore* const store_;
  const Slot* slot_ = nullptr;
};

absl::StatusOr<std::unique_ptr<KvStore>> DeviceStore::Open(const KvRegion& region) {
  cudaPointerAttributes first = {};
  cudaPointerAttributes last = {};
  if (cudaPointerGetAttributes(&first, region.base) != cudaSuccess ||
      cudaPointerGetAttributes(&last, region.base + region.TotalBytes() - 1) != cudaSuccess ||
      first.type != cudaMemoryTypeDevice || last.type != cudaMemoryTypeDevice ||
      first.device != last.device) {
    cudaGetLastError();
    return InvalidArgument("region must be {} bytes of one card's memory", region.TotalBytes());
  }
  if (reinterpret_cast<uintptr_t>(region.base) % kStagingAlignment != 0 ||
      region.layout.PageBytes() % kStagingAlignment != 0) {
    return InvalidArgument("region and its pages must be aligned to {} bytes", kStagingAlignment);
  }
  if (2 * static_cast<size_t>(region.layout.num_kv_heads) > kMaxPages) {
    return InvalidArgument("num_kv_heads must be at most {}, got {}", kMaxPages / 2,
                           region.layout.num_kv_heads);
  }
  std::unique_ptr<DeviceStore> store(new DeviceStore(region, first.device));
  if (cudaSetDevice(first.device) != cudaSuccess)
    return InvalidArgument("no card {}", first.device);
  int least = 0;
  int greatest = 0;
  TANDEM_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  for (Slot& slot : store->slots_) {
    const size_t digest_bytes = kMaxPages * sizeof(uint64_t);
    slot.table = AllocatePinned(kTableBytes + digest_bytes + kBufferBytes);
    if (slot.table == nullptr) {
      return ResourceExhausted("no pinned memory to stage KV blocks in: {} bytes are needed",
                               kSlots * (kTableBytes + digest_bytes + kBufferBytes));
    }
    slot.digests = reinterpret_cast<uint64_t*>(slot.table + kTableBytes);
    slot.buffer = slot.table + kTableBytes + digest_bytes;
    // Before the work of a long prefill that waits for a processor, for somebody waits for these.
    TANDEM_CUDA_CHECK(cudaStreamCreateWithPriority(&slot.stream, cudaStreamNonBlocking, greatest));
    absl::MutexLock lock(&store->mutex_);
    store->free_.push_back(&slot);
  }
  return store;
}

DeviceStore::DeviceStore(const KvRegion& region, int device)
    : region_(region),
      shape_(ShapeOf(region)),
      device_(device),
      pinned_(std::make_shared<PinnedCache>(device)) {}

DeviceStore::~DeviceStore() {
  cudaSetDevice(device_);
  for (const Slot& slot : slots_) {
    if (slot.stream != nullptr) cudaStreamDestroy(slot.stream);
    if (slot.table != nullptr) cudaFreeHost(slot.table);
  }
}

absl::StatusOr<ExportedPool> DeviceStore::Export() const {
  if (region_.fd < 0) {
    return FailedPrecondition("the card cannot share the KV pool's memory with other processes");
  }
  return ExportedPool{region_.fd, shape_.TotalBytes(), CardName(device_)};
}

absl::Status DeviceStore::CanWrite(const std::string& card) const {
  return CheckCanWrite(device_, card);
}

absl::StatusOr<std::unique_ptr<PeerPool>> DeviceStore::MapPeer(int fd, const KvPoolShape& peer,
                                                               std::span<std::byte> control) const {
  return MapDevicePeer(this, region_.base, device_, fd, peer, control);
}

absl::StatusOr<std::unique_ptr<HostWindow>> DeviceStore::OpenWindow(std::span<std::byte> window,
                                                                    size_t max_copy_bytes) const {
  return OpenDeviceWindow(region_, device_, window, max_copy_bytes);
}

int DeviceStore::HostNode() const { return NodeOfCard(device_); }

#ifdef TANDEM_NCCL
absl::StatusOr<std::string> DeviceStore::FifoPlace() const { return NcclPlace(device_); }

absl::StatusOr<std::string> DeviceStore::NewFifoId() const { return NewNcclId(device_); }

absl::StatusOr<std::unique_ptr<PeerFifo>> DeviceStore::JoinFifo(const std::string& id, FifoEnd end,
                                                                size_t max_copy_bytes,
                                                                absl::Duration patience) const {
  return JoinNccl(region_, device_, id, end, max_copy_bytes, patience);
}
#else
absl::StatusOr<std::string> DeviceStore::FifoPlace() const {
  return FailedPrecondition("this build has no NCCL");
}

absl::StatusOr<std::string> DeviceStore::NewFifoId() const { return FifoPlace().status(); }

absl::StatusOr<std::unique_ptr<PeerFifo>> DeviceStore::JoinFifo(const std::string& /*id*/,
                                                                FifoEnd /*end*/,
                                                                size_t /*max_copy_bytes*/,
                                                                absl::Duration /*patience*/) const {
  return FifoPlace().status();
}
#endif

std::shared_ptr<std::byte[]> DeviceStore::AllocateStaging(size_t bytes) const {
  return pinned_->Take(bytes);
}

bool DeviceStore::IsPinned(const std::byte* host) const {
  cudaPointerAttributes attributes = {};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeHost && attributes.devicePointer == host;
}

void DeviceStore::CopyPieces(std::span<const CopyPiece> pieces, std::byte* host,
                             CopyDirection direction) const {
  const SlotLease slot(this);
  const bool pinned = IsPinned(host);
  StagingPlan plan(pieces, direction,
                   {kPieceBytes, kTableBytes / sizeof(StagedPiece),
                    pinned ? std::numeric_limits<size_t>::max() : kBufferBytes});
  while (true) {
    const std::vector<StagedPiece>& batch = plan.Next();
    if (batch.empty()) return;
    std::memcpy(slot->table, batch.data(), batch.size() * sizeof(StagedPiece));
    if (!pinned && direction == CopyDirection::kIntoPool) {
      for (const StagedPiece& piece : batch) {
        std::memcpy(slot->buffer + piece.buffer_offset, host + piece.host_offset, piece.bytes);
      }
    }
    PieceCopyArgs args;
    args.pool = region_.base;
    args.host = pinned ? host : slot->buffer;
    args.pieces = reinterpret_cast<const StagedPiece*>(slot->table);
    args.num_pieces = static_cast<int>(batch.size());
    args.buffered = !pinned;
    args.direction = direction;
    TANDEM_CUDA_CHECK(cuda::CopyPieces(args, slot->stream));
    TANDEM_CUDA_CHECK(cudaStreamSynchronize(slot->stream));
    if (!pinned && direction == CopyDirection::kFromPool) {
      for (const StagedPiece& piece : batch) {
        std::memcpy(host + piece.host_offset, slot->buffer + piece.buffer_offset, piece.bytes);
      }
    }
  }
}

void DeviceStore::Gather(std::span<const CopyPiece> pieces, std::byte* to) const {
  CopyPieces(pieces, to, CopyDirection::kFromPool);
}

void DeviceStore::Scatter(const std::byte* from, std::span<const CopyPiece> pieces) const {
  // Only read.
  CopyPieces(pieces, const_cast<std::byte*>(from), CopyDirection::kIntoPool);
}

template <typename OnBlock>
void DeviceStore::DigestPages(const BlockRun& run, std::byte* to, OnBlock on_block) const {
  const SlotLease slot(this);
  const size_t per_layer = run.source_blocks.size();
  const size_t total = per_layer * static_cast<size_t>(run.layer_count);
  const size_t pages_per_block = 2 * static_cast<size_t>(run.heads.count);
  const size_t batch = std::min(kMaxPages / pages_per_block, kTableBytes / sizeof(PlacedBlock));
  auto* blocks = reinterpret_cast<PlacedBlock*>(slot->table);
  for (size_t begin = 0; begin < total; begin += batch) {
    const size_t count = std::min(batch, total - begin);
    for (size_t i = 0; i < count; ++i) {
      const int layer = run.layer_begin + static_cast<int>((begin + i) / per_layer);
      const int32_t block = run.source_blocks[(begin + i) % per_layer];
      blocks[i] = {shape_.BlockOffset(layer, block), layer, 0};
    }
    PageRunArgs args;
    args.pool = region_.base;
    args.blocks = blocks;
    args.num_blocks = static_cast<int>(count);
    args.pool_heads = shape_.layout.num_kv_heads;
    args.pool_first_head = shape_.first_head;
    args.head_begin = run.heads.begin;
    args.head_count = run.heads.count;
    args.page_bytes = static_cast<uint32_t>(shape_.layout.PageBytes());
    args.to = to == nullptr ? nullptr : to + begin * run.BytesPerBlock(shape_.layout);
    args.digests = slot->digests;
    TANDEM_CUDA_CHECK(cuda::DigestPages(args, slot->stream));
    TANDEM_CUDA_CHECK(cudaStreamSynchronize(slot->stream));
    for (size_t i = 0; i < count; ++i) {
      on_block(begin + i,
               std::span<const uint64_t>(slot->digests + i * pages_per_block, pages_per_block));
    }
  }
}

void DeviceStore::GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const {
  const bool pinned = IsPinned(to);
  DigestPages(run, pinned ? to : nullptr, [&](size_t block, std::span<const uint64_t> pages) {
    digests[block % digests.size()] ^= AllOf(pages);
  });
  if (pinned) return;
  std::vector<CopyPiece> pieces;
  const uint64_t bytes = run.BytesPerBlock(shape_.layout) / 2;
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (const int32_t block : run.source_blocks) {
      for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
        pieces.push_back(
            {shape_.PageOffset(layer, block, kind, run.heads.begin), pieces.size() * bytes, bytes});
      }
    }
  }
  Gather(pieces, to);
}

bool DeviceStore::CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to,
                          CopyMode /*mode*/, std::span<uint64_t> digests,
                          absl::FunctionRef<bool()> go_on) const {
  const size_t page = shape_.layout.PageBytes();
  const size_t block_bytes = run.BytesPerBlock(shape_.layout);
  const size_t batch = std::max<size_t>(1, kBufferBytes / block_bytes);
  const std::shared_ptr<std::byte[]> staging = AllocateStaging(batch * block_bytes);
  size_t since_asked = kMaxPieceBytes;  // ask before the first page
  // What GatherRun() has left of block i of the run.
  const auto unstage = [&](int layer, size_t i, const std::byte* from) {
    for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
      for (int head = run.heads.begin; head < run.heads.end(); ++head) {
        if (since_asked + page > kMaxPieceBytes) {
          if (!go_on()) return false;
          since_asked = 0;
        }
        since_asked += page;
        std::memcpy(to + target.PageOffset(layer, run.target_blocks[i], kind, head), from, page);
        from += page;
      }
    }
    return true;
  };
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t begin = 0; begin < run.source_blocks.size(); begin += batch) {
      BlockRun part = run;
      part.layer_begin = layer;
      part.layer_count = 1;
      part.source_blocks =
          run.source_blocks.subspan(begin, std::min(batch, run.source_blocks.size() - begin));
      GatherRun(part, staging.get(), digests.subspan(begin, part.source_blocks.size()));
      for (size_t i = 0; i < part.source_blocks.size(); ++i) {
        if (!unstage(layer, begin + i, staging.get() + i * block_bytes)) return false;
      }
    }
  }
  return true;
}

void DeviceStore::Digest(const BlockRun& run, std::span<uint64_t> digests) const {
  const auto count = static_cast<size_t>(run.heads.count);
  DigestPages(run, nullptr, [&](size_t block, std::span<const uint64_t> pages) {
    for (size_t head = 0; head < count; ++head) {
      digests[block * count + head] = pages[head] ^ pages[count + head];
    }
  });
}

std::vector<uint64_t> DeviceStore::DigestRun(const BlockRun& run) const {
  std::vector<uint64_t> digests(run.source_blocks.size(), 0);
  // All layers together: a launch costs more than the pages of one.
  DigestPages(run, nullptr, [&](size_t block, std::span<const uint64_t> pages) {
    digests[block % digests.size()] ^= AllOf(pages);
  });
  return digests;
}

}  // namespace tandem::kvtransfer::cuda
