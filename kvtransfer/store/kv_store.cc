#include "kvtransfer/store/kv_store.h"

#include "common/base/status.h"
#include "kvtransfer/store/host_store.h"

namespace tandem::kvtransfer {

absl::StatusOr<std::unique_ptr<KvStore>> MakeKvStore(const KvRegion& region) {
  if (region.base == nullptr || region.num_blocks < 1) {
    return InvalidArgument("region must have memory and at least one block");
  }
  TANDEM_RETURN_IF_ERROR(ValidateShape(ShapeOf(region)));
  if (region.memory != KvMemoryKind::kHost) {
    return absl::UnimplementedError("KV pools in device memory need a build with CUDA");
  }
  return std::make_unique<HostStore>(region);
}

std::vector<uint64_t> DigestRun(const KvStore& store, const BlockRun& run) {
  std::vector<uint64_t> by_head(static_cast<size_t>(run.heads.count));
  std::vector<uint64_t> digests(run.source_blocks.size(), 0);
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t i = 0; i < digests.size(); ++i) {
      store.Digest(layer, run.source_blocks[i], run.heads, by_head);
      for (const uint64_t digest : by_head) digests[i] ^= digest;
    }
  }
  return digests;
}

}  // namespace tandem::kvtransfer
