#include "kvtransfer/store/host_store.h"

#include <cstring>

#include "common/base/status.h"
#include "kvtransfer/store/page_digest.h"

namespace tandem::kvtransfer {

absl::StatusOr<ExportedPool> HostStore::Export() const {
  if (region_.fd < 0) return FailedPrecondition("the KV pool is not shared memory");
  return ExportedPool{region_.fd, shape_.TotalBytes()};
}

std::shared_ptr<std::byte[]> HostStore::AllocateStaging(size_t bytes) const {
  return std::make_shared_for_overwrite<std::byte[]>(bytes);
}

void HostStore::Gather(std::span<const CopyPiece> pieces, std::byte* to) const {
  for (const CopyPiece& piece : pieces) {
    std::memcpy(to + piece.target_offset, region_.base + piece.source_offset, piece.bytes);
  }
}

void HostStore::Scatter(const std::byte* from, std::span<const CopyPiece> pieces) const {
  for (const CopyPiece& piece : pieces) {
    std::memcpy(region_.base + piece.target_offset, from + piece.source_offset, piece.bytes);
  }
}

void HostStore::GatherRun(const BlockRun& run, std::byte* to, std::span<uint64_t> digests) const {
  const size_t page = shape_.layout.PageBytes();
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t i = 0; i < run.source_blocks.size(); ++i) {
      for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
        for (int head = run.heads.begin; head < run.heads.end(); ++head) {
          const std::byte* from =
              region_.base + shape_.PageOffset(layer, run.source_blocks[i], kind, head);
          digests[i] ^= CopyAndDigestPage({from, page}, to, CopyMode::kCached, layer, kind, head);
          to += page;
        }
      }
    }
  }
}

bool HostStore::CopyRun(const BlockRun& run, const KvPoolShape& target, std::byte* to,
                        CopyMode mode, std::span<uint64_t> digests,
                        absl::FunctionRef<bool()> go_on) const {
  const size_t page = shape_.layout.PageBytes();
  size_t since_asked = kMaxPieceBytes;  // ask before the first page
  const auto copy = [&](int layer, size_t i, PageKind kind, int head) {
    if (since_asked + page > kMaxPieceBytes) {
      if (!go_on()) return false;
      since_asked = 0;
    }
    since_asked += page;
    const std::byte* from =
        region_.base + shape_.PageOffset(layer, run.source_blocks[i], kind, head);
    digests[i] ^= CopyAndDigestPage({from, page},
                                    to + target.PageOffset(layer, run.target_blocks[i], kind, head),
                                    mode, layer, kind, head);
    return true;
  };
  const auto copy_block = [&](int layer, size_t i) {
    for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
      for (int head = run.heads.begin; head < run.heads.end(); ++head) {
        if (!copy(layer, i, kind, head)) return false;
      }
    }
    return true;
  };
  bool whole = true;
  for (int layer = run.layer_begin; whole && layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t i = 0; whole && i < run.source_blocks.size(); ++i) whole = copy_block(layer, i);
  }
  if (mode == CopyMode::kPastCaches) FlushCopies();
  return whole;
}

void HostStore::Digest(const BlockRun& run, std::span<uint64_t> digests) const {
  const size_t page = shape_.layout.PageBytes();
  size_t at = 0;
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (const int32_t block : run.source_blocks) {
      for (int head = run.heads.begin; head < run.heads.end(); ++head) {
        uint64_t digest = 0;
        for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
          const std::byte* bytes = region_.base + shape_.PageOffset(layer, block, kind, head);
          digest ^= PageDigest({bytes, page}, layer, kind, head);
        }
        digests[at++] = digest;
      }
    }
  }
}

}  // namespace tandem::kvtransfer
