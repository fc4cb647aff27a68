#include "kvtransfer/channel/outgoing_transfer.h"

#include "common/base/status.h"
#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/transport/frame.h"

namespace tandem::kvtransfer {

OutgoingTransfer::OutgoingTransfer(KvSendTarget wanted, int num_layers, std::string transport)
    : target(std::move(wanted)) {
  missing = target.target_blocks.size() * static_cast<size_t>(num_layers);
  sent.resize(missing, false);
  digests.resize(target.target_blocks.size(), 0);
  stats.transport = std::move(transport);
}

absl::Status OutgoingTransfer::Check(const PushedRun& run, const KvRegion& region) const {
  if (run.layer < 0 || run.layer >= region.layout.num_layers) {
    return InvalidArgument("pushed layer must be in [0, {}), got {}", region.layout.num_layers,
                           run.layer);
  }
  const auto blocks = static_cast<int64_t>(target.target_blocks.size());
  const int64_t end = int64_t{run.ordinal_begin} + static_cast<int64_t>(run.source_blocks.size());
  if (run.ordinal_begin < 0 || end > blocks) {
    return InvalidArgument("pushed ordinals [{}, {}) must be in [0, {})", run.ordinal_begin, end,
                           blocks);
  }
  return ValidateBlocks("source_blocks", run.source_blocks, region.num_blocks);
}

bool OutgoingTransfer::AnySent(const PushedRun& run) const {
  for (size_t i = 0; i < run.source_blocks.size(); ++i) {
    if (sent[Bit(run.layer, run.ordinal_begin + static_cast<int32_t>(i))]) return true;
  }
  return false;
}

void OutgoingTransfer::Account(const PushedRun& run, const KvRegion& region) {
  const size_t bytes = region.layout.BlockLayerBytes();
  for (size_t i = 0; i < run.source_blocks.size(); ++i) {
    const int32_t ordinal = run.ordinal_begin + static_cast<int32_t>(i);
    digests[static_cast<size_t>(ordinal)] ^= BlockLayerDigest(
        {region.Block(run.layer, run.source_blocks[i]), bytes}, static_cast<uint32_t>(run.layer));
    sent[Bit(run.layer, ordinal)] = true;
    --missing;
    stats.bytes += bytes;
  }
}

std::string OutgoingTransfer::DigestPayload() const {
  return std::string(reinterpret_cast<const char*>(digests.data()),
                     digests.size() * sizeof(uint64_t));
}

}  // namespace tandem::kvtransfer
