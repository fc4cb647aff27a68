#include "kvtransfer/store/sharded_store.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::kvtransfer {

absl::StatusOr<std::unique_ptr<ShardedStore>> ShardedStore::Join(
    std::vector<std::unique_ptr<KvStore>> shards) {
  if (shards.size() < 2)
    return InvalidArgument("a pool in pieces needs two, got {}", shards.size());
  KvPoolShape shape = shards.front()->shape();
  for (size_t i = 1; i < shards.size(); ++i) {
    const KvPoolShape& next = shards[i]->shape();
    KvLayout layout = next.layout;
    layout.num_kv_heads = shape.layout.num_kv_heads;
    if (layout != shape.layout || next.first_head != shape.heads().end()) {
      return InvalidArgument(
          "piece {} of the KV pool has another layout than those before, or other heads than "
          "follow them",
          i);
    }
    shape.layout.num_kv_heads += next.layout.num_kv_heads;
    shape.num_blocks = std::min(shape.num_blocks, next.num_blocks);
  }
  TANDEM_RETURN_IF_ERROR(ValidateShape(shape));
  return std::unique_ptr<ShardedStore>(new ShardedStore(std::move(shards), shape));
}

absl::StatusOr<ExportedPool> ShardedStore::Export() const {
  return FailedPrecondition("the KV pool lies in {} pieces (--tensor-parallel-size)",
                            shards_.size());
}

size_t ShardedStore::ShardOf(int head) const {
  size_t shard = 0;
  while (head >= shards_[shard]->shape().heads().end()) ++shard;
  return shard;
}

void ShardedStore::ForPages(
    uint64_t offset, uint64_t bytes,
    absl::FunctionRef<void(size_t, uint64_t, uint64_t, uint64_t)> piece) const {
  const uint64_t page_bytes = shape_.layout.PageBytes();
  const auto heads = static_cast<uint64_t>(shape_.layout.num_kv_heads);
  const auto blocks = static_cast<uint64_t>(shape_.num_blocks);
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t page = (offset + done) / page_bytes, within = (offset + done) % page_bytes;
    const uint64_t count = std::min(page_bytes - within, bytes - done);
    const uint64_t block = page / (2 * heads);
    const int head = shape_.first_head + static_cast<int>(page % heads);
    const size_t shard = ShardOf(head);
    const uint64_t at = shards_[shard]->shape().PageOffset(
        static_cast<int>(block / blocks), static_cast<int32_t>(block % blocks),
        static_cast<PageKind>(page / heads % 2), head);
    piece(shard, at + within, done, count);
    done += count;
  }
}

void ShardedStore::Gather(std::span<const CopyPiece> pieces, std::byte* to) const {
  std::vector<std::vector<CopyPiece>> parts(shards_.size());
  for (const CopyPiece& piece : pieces) {
    ForPages(piece.source_offset, piece.bytes,
             [&](size_t shard, uint64_t at, uint64_t done, uint64_t bytes) {
               parts[shard].push_back({at, piece.target_offset + done, bytes});
             });
  }
  for (size_t i = 0; i < shards_.size(); ++i) {
    if (!parts[i].empty()) shards_[i]->Gather(parts[i], to);
  }
}

void ShardedStore::Scatter(const std::byte* from, std::span<const CopyPiece> pieces) const {
  std::vector<std::vector<CopyPiece>> parts(shards_.size());
  for (const CopyPiece& piece : pieces) {
    ForPages(piece.target_offset, piece.bytes,
             [&](size_t shard, uint64_t at, uint64_t done, uint64_t bytes) {
               parts[shard].push_back({piece.source_offset + done, at, bytes});
             });
  }
  for (size_t i = 0; i < shards_.size(); ++i) {
    if (!parts[i].empty()) shards_[i]->Scatter(from, parts[i]);
  }
}

void ShardedStore::GatherRun(const BlockRun& run, std::byte* to,
                             std::span<uint64_t> digests) const {
  const uint64_t bytes = static_cast<uint64_t>(run.heads.count) * shape_.layout.PageBytes();
  std::vector<CopyPiece> pieces;
  uint64_t at = 0;
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (const int32_t block : run.source_blocks) {
      for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
        pieces.push_back({shape_.PageOffset(layer, block, kind, run.heads.begin), at, bytes});
        at += bytes;
      }
    }
  }
  Gather(pieces, to);
  // A digest is the XOR over heads.
  const std::vector<uint64_t> of_run = DigestRun(run);
  for (size_t i = 0; i < digests.size(); ++i) digests[i] ^= of_run[i];
}

// For transports that write a peer's pool themselves: none of them gets this one (Export).
bool ShardedStore::CopyRun(const BlockRun& /*run*/, const KvPoolShape& /*target*/,
                           std::byte* /*to*/, CopyMode /*mode*/, std::span<uint64_t> /*digests*/,
                           absl::FunctionRef<bool()> /*go_on*/) const {
  TANDEM_CHECK(false, "a KV pool in pieces is not written into a peer's");
  return false;
}

void ShardedStore::Digest(const BlockRun& run, std::span<uint64_t> digests) const {
  const auto heads = static_cast<size_t>(run.heads.count);
  for (const auto& shard : shards_) {
    BlockRun part = run;
    part.heads = Intersect(run.heads, shard->shape().heads());
    if (part.heads.count == 0) continue;
    const auto own = static_cast<size_t>(part.heads.count);
    const auto first = static_cast<size_t>(part.heads.begin - run.heads.begin);
    std::vector<uint64_t> by_head(digests.size() / heads * own);
    shard->Digest(part, by_head);
    for (size_t i = 0; i < by_head.size(); ++i) {
      digests[i / own * heads + first + i % own] = by_head[i];
    }
  }
}

}  // namespace tandem::kvtransfer
