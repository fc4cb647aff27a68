// A FIFO between the memory of two cards (PeerFifo), by NCCL: a communicator of two ranks, of which
// the writer's is 0.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/kv_layout.h"
#include "kvtransfer/store/peer_fifo.h"

namespace tandem::kvtransfer::cuda {

// KvStore::FifoPlace(), NewFifoId() and JoinFifo() of a pool `region` in the memory of `device`.
absl::StatusOr<std::string> NcclPlace(int device);
absl::StatusOr<std::string> NewNcclId(int device);
absl::StatusOr<std::unique_ptr<PeerFifo>> JoinNccl(const KvRegion& region, int device,
                                                   const std::string& id, FifoEnd end,
                                                   size_t max_copy_bytes, absl::Duration patience);

}  // namespace tandem::kvtransfer::cuda
