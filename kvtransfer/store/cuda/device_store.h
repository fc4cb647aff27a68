// A pool in the memory of a CUDA card.
//
// The host's part of every copy is pinned memory that the card's kernels read and write themselves:
// what AllocateStaging() gave, or else a buffer of a slot, with one more copy by the CPU. A call
// takes a slot {stream, tables, buffer}, launches once per batch (all pieces of a call, unless they
// are more than a slot's tables or buffer hold), and waits. There are kSlots of them; a call that
// finds none waits for one, so the memory is bounded whatever the number of threads.
//
// The streams do not wait for other streams: what a caller wants to read must be written (the
// sender waits for a ReadyEvent), and what it writes is there for all later work when it returns.
// An error of the card ends the process (common/cuda/cuda_check.h).
#pragma once

#include <array>
#include <cuda_runtime.h>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "kvtransfer/store/cuda/page_kernels.h"
#include "kvtransfer/store/kv_store.h"

namespace tandem::kvtransfer::cuda {

class DeviceStore final : public KvStore {
 public:
  // INVALID_ARGUMENT where the region is not memory of one card; RESOURCE_EXHAUSTED where there is
  // no pinned memory. `region` is valid otherwise (MakeKvStore checks it).
  static absl::StatusOr<std::unique_ptr<KvStore>> Open(const KvRegion& region);
  ~DeviceStore() override;

  const KvPoolShape& shape() const override { return shape_; }
  KvMemoryKind kind() const override { return KvMemoryKind::kDevice; }
  absl::StatusOr<ExportedPool> Export() const override;
  absl::Status CanWrite(const std::string& card) const override;
  absl::StatusOr<std::unique_ptr<PeerPool>> MapPeer(int fd, const KvPoolShape& peer,
                                                    std::span<std::byte> control) const override;
  absl::StatusOr<std::unique_ptr<HostWindow>> OpenWindow(std::span<std::byte> window,
                                                         size_t max_copy_bytes) const override;
  int HostNode() const override;
  absl::StatusOr<std::string> FifoPlace() const override;
  absl::StatusOr<std::string> NewFifoId() const override;
  absl::StatusOr<std::unique_ptr<PeerFifo>> JoinFifo(const std::string& id, FifoEnd end,
                                                     size_t max_copy_bytes,
                                                     absl::Duration patience) const override;
  std::byte* HostAddress(uint64_t /*offset*/) const override { return nullptr; }
  // A launch and the wait for it cost what 1 MiB costs on the link; where processes take turns on a
  // card, every launch may wait for a turn.
  size_t BatchBytes() const override { return size_t{4} << 20; }
  // Pinned. Kept for the next caller when it is given back, for pinning and unpinning disturb the
  // card's work.
  std::shared_ptr<std::byte[]> AllocateStaging(size_t bytes) const override;
  void Gather(std::span<const CopyPiece> pieces, std::byte* to) const override;
  void Scatter(const std::byte* from, std::span<const CopyPiece> pieces) const override;
  void GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const override;
  bool CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to, CopyMode mode,
               std::span<uint64_t> digests, absl::FunctionRef<bool()> go_on) const override;
  void Digest(const BlockRun& run, std::span<uint64_t> digests) const override;
  size_t DigestBatchBytes() const override { return size_t{64} << 20; }
  std::vector<uint64_t> DigestRun(const BlockRun& run) const override;

 private:
  static constexpr int kSlots = 4;
  static constexpr size_t kBufferBytes = 1 << 20;
  static constexpr size_t kTableBytes = 64 << 10;
  static constexpr size_t kMaxPages = 16384;  // of one launch that digests

  struct Slot {
    cudaStream_t stream = nullptr;
    // Pinned, in one allocation.
    std::byte* table = nullptr;   // kTableBytes of StagedPiece or PlacedBlock
    uint64_t* digests = nullptr;  // kMaxPages
    std::byte* buffer = nullptr;  // kBufferBytes
  };
  // A slot while a call has it.
  class SlotLease;
  class PinnedCache;

  DeviceStore(const KvRegion& region, int device);

  void CopyPieces(std::span<const CopyPiece> pieces, std::byte* host,
                  CopyDirection direction) const;
  // Digests the pages of `run`, and copies them to `to`, which is pinned or null, as GatherRun()
  // does; on_block(i, pages) is told the digests of the K and V pages of block i in that order.
  template <typename OnBlock>
  void DigestPages(const BlockRun& run, std::byte* to, OnBlock on_block) const;
  // Whether kernels can use the host's memory from `host` on at its own address.
  bool IsPinned(const std::byte* host) const;

  const KvRegion region_;
  const KvPoolShape shape_;
  const int device_;
  const std::shared_ptr<PinnedCache> pinned_;
  mutable absl::Mutex mutex_;
  std::array<Slot, kSlots> slots_;  // what they name is a call's between taking and giving back
  mutable std::vector<const Slot*> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::kvtransfer::cuda
