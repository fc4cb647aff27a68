#include "kvtransfer/store/kv_store.h"

#include "common/base/status.h"
#include "kvtransfer/store/host_store.h"
#ifdef TANDEM_CUDA
#include "kvtransfer/store/cuda/device_store.h"
#endif

namespace tandem::kvtransfer {

absl::StatusOr<std::unique_ptr<KvStore>> MakeKvStore(const KvRegion& region) {
  if (region.base == nullptr || region.num_blocks < 1) {
    return InvalidArgument("region must have memory and at least one block");
  }
  TANDEM_RETURN_IF_ERROR(ValidateShape(ShapeOf(region)));
  if (region.memory == KvMemoryKind::kDevice) {
#ifdef TANDEM_CUDA
    return cuda::DeviceStore::Open(region);
#else
    return absl::UnimplementedError("KV pools in device memory need a build with CUDA");
#endif
  }
  return std::make_unique<HostStore>(region);
}

absl::Status KvStore::CanWrite(const std::string& /*card*/) const {
  return FailedPrecondition("the KV pool is not memory of a card");
}

absl::StatusOr<std::unique_ptr<PeerPool>> KvStore::MapPeer(int /*fd*/, const KvPoolShape& /*peer*/,
                                                           std::span<std::byte> /*control*/) const {
  return FailedPrecondition("the KV pool is not memory of a card");
}

std::vector<uint64_t> KvStore::DigestRun(const BlockRun& run) const {
  const auto heads = static_cast<size_t>(run.heads.count);
  const size_t blocks = run.source_blocks.size();
  std::vector<uint64_t> by_head(static_cast<size_t>(run.layer_count) * blocks * heads);
  Digest(run, by_head);
  std::vector<uint64_t> digests(blocks, 0);
  for (size_t i = 0; i < by_head.size(); ++i) digests[i / heads % blocks] ^= by_head[i];
  return digests;
}

}  // namespace tandem::kvtransfer
