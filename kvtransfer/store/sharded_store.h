// A pool in pieces, each with some of the heads in memory of its own: that of a worker whose model
// is split over several ranks (tensor parallelism). To everybody else it is one pool with all
// heads, so that workers whose models are split in different ways ship to each other as any do:
// the pages of a head are the same on both sides.
#pragma once

#include <memory>
#include <vector>

#include "kvtransfer/store/kv_store.h"

namespace tandem::kvtransfer {

class ShardedStore final : public KvStore {
 public:
  // Of at least two stores with the same layout but for the heads, in the order of their heads,
  // which leave none out. The pool has the blocks that all have. INVALID_ARGUMENT says what does
  // not fit.
  static absl::StatusOr<std::unique_ptr<ShardedStore>> Join(
      std::vector<std::unique_ptr<KvStore>> shards);

  const KvPoolShape& shape() const override { return shape_; }
  // Only its functions reach the bytes, wherever they lie.
  KvMemoryKind kind() const override { return KvMemoryKind::kDevice; }
  absl::StatusOr<ExportedPool> Export() const override;
  std::byte* HostAddress(uint64_t /*offset*/) const override { return nullptr; }
  size_t BatchBytes() const override { return shards_.front()->BatchBytes(); }
  std::shared_ptr<std::byte[]> AllocateStaging(size_t bytes) const override {
    return shards_.front()->AllocateStaging(bytes);
  }
  void Gather(std::span<const CopyPiece> pieces, std::byte* to) const override;
  void Scatter(const std::byte* from, std::span<const CopyPiece> pieces) const override;
  void GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const override;
  bool CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to, CopyMode mode,
               std::span<uint64_t> digests, absl::FunctionRef<bool()> go_on) const override;
  void Digest(const BlockRun& run, std::span<uint64_t> digests) const override;
  size_t DigestBatchBytes() const override { return shards_.front()->DigestBatchBytes(); }

 private:
  ShardedStore(std::vector<std::unique_ptr<KvStore>> shards, const KvPoolShape& shape)
      : shards_(std::move(shards)), shape_(shape) {}

  // Calls `piece(shard, offset in the shard's pool, offset in the range, bytes)` for each page, or
  // part of one, of a range of this pool.
  void ForPages(uint64_t offset, uint64_t bytes,
                absl::FunctionRef<void(size_t, uint64_t, uint64_t, uint64_t)> piece) const;
  size_t ShardOf(int head) const;

  const std::vector<std::unique_ptr<KvStore>> shards_;
  const KvPoolShape shape_;
};

}  // namespace tandem::kvtransfer
