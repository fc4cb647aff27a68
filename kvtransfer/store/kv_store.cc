#include "kvtransfer/store/kv_store.h"

#include <algorithm>
#include <cstring>

#include "common/base/status.h"
#include "kvtransfer/store/host_store.h"
#include "kvtransfer/store/sharded_store.h"
#ifdef TANDEM_CUDA
#include "kvtransfer/store/cuda/device_store.h"
#endif

namespace tandem::kvtransfer {
namespace {

// Copies by the calling thread.
class PlainWindow final : public HostWindow {
 public:
  PlainWindow(const KvStore* store, std::span<std::byte> window) : store_(store), window_(window) {}

  std::unique_ptr<Gathering> Gather(const BlockRun& run, size_t at) override {
    std::vector<uint64_t> digests(run.source_blocks.size(), 0);
    store_->GatherRun(run, window_.data() + at, digests);
    return std::make_unique<Gathered>(std::move(digests));
  }
  std::unique_ptr<Fetched> Fetch(size_t at, size_t /*bytes*/) override {
    return std::make_unique<InPlace>(store_, window_.data() + at);
  }
  void ProbeOut(size_t at, size_t bytes, std::span<const std::byte> pattern) override {
    if (pattern.empty()) {
      std::memset(window_.data() + at, 0, bytes);
    } else {
      std::memcpy(window_.data() + at, pattern.data(), pattern.size());
    }
  }
  std::vector<std::byte> ProbeIn(size_t at, size_t bytes, bool wanted) override {
    // Without a copy where nobody wants one: Scatter() reads the window itself.
    const auto from = window_.subspan(at, bytes);
    return wanted ? std::vector<std::byte>(from.begin(), from.end()) : std::vector<std::byte>();
  }

 private:
  class Gathered final : public Gathering {
   public:
    explicit Gathered(std::vector<uint64_t> digests) : digests_(std::move(digests)) {}
    absl::Status Wait() override { return absl::OkStatus(); }
    std::span<const uint64_t> digests() const override { return digests_; }

   private:
    const std::vector<uint64_t> digests_;
  };
  class InPlace final : public Fetched {
   public:
    InPlace(const KvStore* store, const std::byte* from) : store_(store), from_(from) {}
    absl::Status Wait() override { return absl::OkStatus(); }
    void Scatter(std::span<const CopyPiece> pieces) override { store_->Scatter(from_, pieces); }

   private:
    const KvStore* const store_;
    const std::byte* const from_;
  };

  const KvStore* const store_;
  const std::span<std::byte> window_;
};

}  // namespace

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

absl::StatusOr<std::unique_ptr<KvStore>> MakeKvStore(const KvRegion& region,
                                                     std::span<const KvRegion> shards) {
  if (shards.empty()) return MakeKvStore(region);
  std::vector<std::unique_ptr<KvStore>> stores;
  for (const KvRegion& shard : shards) {
    TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<KvStore> store, MakeKvStore(shard));
    stores.push_back(std::move(store));
  }
  return ShardedStore::Join(std::move(stores));
}

absl::Status KvStore::CanWrite(const std::string& /*card*/) const {
  return FailedPrecondition("the KV pool is not memory of a card");
}

absl::StatusOr<std::unique_ptr<PeerPool>> KvStore::MapPeer(int /*fd*/, const KvPoolShape& /*peer*/,
                                                           std::span<std::byte> /*control*/) const {
  return FailedPrecondition("the KV pool is not memory of a card");
}

absl::StatusOr<std::unique_ptr<HostWindow>> KvStore::OpenWindow(std::span<std::byte> window,
                                                                size_t /*max_copy_bytes*/) const {
  return std::make_unique<PlainWindow>(this, window);
}

absl::StatusOr<std::string> KvStore::FifoPlace() const {
  return FailedPrecondition("the KV pool is not memory of a card");
}

absl::StatusOr<std::string> KvStore::NewFifoId() const { return FifoPlace().status(); }

absl::StatusOr<std::unique_ptr<PeerFifo>> KvStore::JoinFifo(const std::string& /*id*/,
                                                            FifoEnd /*end*/,
                                                            size_t /*max_copy_bytes*/,
                                                            absl::Duration /*patience*/) const {
  return FifoPlace().status();
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
