// A pool in memory of the CPU, shared with other processes or not.
#pragma once

#include "kvtransfer/store/kv_store.h"

namespace tandem::kvtransfer {

// Not final: tests stop a copy in its middle, or damage it.
class HostStore : public KvStore {
 public:
  // `region` is valid (MakeKvStore checks it) and outlives this.
  explicit HostStore(const KvRegion& region) : region_(region), shape_(ShapeOf(region)) {}

  const KvPoolShape& shape() const override { return shape_; }
  KvMemoryKind kind() const override { return KvMemoryKind::kHost; }
  absl::StatusOr<ExportedPool> Export() const override;
  std::byte* HostAddress(uint64_t offset) const override { return region_.base + offset; }
  // To amortise system calls.
  size_t BatchBytes() const override { return 1 << 20; }
  std::shared_ptr<std::byte[]> AllocateStaging(size_t bytes) const override;
  void Gather(std::span<const CopyPiece> pieces, std::byte* to) const override;
  void Scatter(const std::byte* from, std::span<const CopyPiece> pieces) const override;
  void GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const override;
  bool CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to, CopyMode mode,
               std::span<uint64_t> digests, absl::FunctionRef<bool()> go_on) const override;
  void Digest(const BlockRun& run, std::span<uint64_t> digests) const override;

 private:
  const KvRegion region_;
  const KvPoolShape shape_;
};

}  // namespace tandem::kvtransfer
