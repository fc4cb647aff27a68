#include "worker/kv_target_wire.h"

#include "fmt/format.h"

#include "common/rpc/status.h"

namespace tandem::worker {

absl::StatusOr<kvtransfer::KvSendTarget> KvTargetFromProto(const internal::v1::KvTarget& target,
                                                           std::string_view name) {
  kvtransfer::KvSendTarget out;
  if (!TransferId::FromBytes(target.transfer_id(), &out.id)) {
    return BadField(fmt::format("{}.transfer_id", name), "must have 16 bytes, got {}",
                    target.transfer_id().size());
  }
  if (target.transport().empty()) {
    return BadField(fmt::format("{}.transport", name), "must be set");
  }
  for (int i = 0; i < target.block_ids_size(); ++i) {
    if (target.block_ids(i) < target.num_blocks()) continue;
    return BadField(fmt::format("{}.block_ids[{}]", name, i), "is {}; the pool has {} blocks",
                    target.block_ids(i), target.num_blocks());
  }
  out.epoch = target.epoch();
  out.transport = target.transport();
  out.address = target.address();
  out.token = target.token();
  out.peer_worker_id = target.worker_id();
  out.target_blocks.assign(target.block_ids().begin(), target.block_ids().end());
  return out;
}

}  // namespace tandem::worker
