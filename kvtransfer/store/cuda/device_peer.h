// Pools of other processes in the memory of cards: their mapping, and the copies into them.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "kvtransfer/store/kv_store.h"

namespace tandem::kvtransfer::cuda {

// The name of a card for all processes of a host: "GPU-" and its UUID, as nvidia-smi says it.
std::string CardName(int device);
// FAILED_PRECONDITION where `device` cannot write the memory of `card`.
absl::Status CheckCanWrite(int device, const std::string& card);

// Memory of a card that another process has exported, for as long as this lives. The memory itself
// stays there even if that process ends.
class PeerMemory {
 public:
  // Maps `bytes` for `device`, which is the calling thread's. UNAVAILABLE says what the driver
  // said.
  static absl::StatusOr<PeerMemory> Map(int device, int fd, size_t bytes);
  PeerMemory(PeerMemory&& other) noexcept;
  PeerMemory& operator=(PeerMemory&&) = delete;
  ~PeerMemory();
  std::byte* data() const { return reinterpret_cast<std::byte*>(address_); }

 private:
  PeerMemory() = default;

  CUmemGenericAllocationHandle handle_ = 0;
  CUdeviceptr address_ = 0;
  size_t size_ = 0;  // whole granules
  bool mapped_ = false;
};

// KvStore::MapPeer() of `store`, whose pool begins at `base` in the memory of `device`.
absl::StatusOr<std::unique_ptr<PeerPool>> MapDevicePeer(const KvStore* store, std::byte* base,
                                                        int device, int fd, const KvPoolShape& peer,
                                                        std::span<std::byte> control);

}  // namespace tandem::kvtransfer::cuda
