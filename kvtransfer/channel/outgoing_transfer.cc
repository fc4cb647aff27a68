#include "kvtransfer/channel/outgoing_transfer.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {

void OutgoingTransfer::Begin(int num_layers, const HeadRange& heads_of_peer,
                             std::string transport) {
  heads = heads_of_peer;
  missing = target.target_blocks.size() * static_cast<size_t>(num_layers);
  sent.resize(missing, false);
  digests.resize(target.target_blocks.size(), 0);
  stats.transport = std::move(transport);
}

absl::Status OutgoingTransfer::Check(const PushedRun& run, const KvPoolShape& source) const {
  if (run.layer_begin < 0 || run.layer_begin + run.layer_count > source.layout.num_layers) {
    return InvalidArgument("pushed layers [{}, +{}) must be in [0, {})", run.layer_begin,
                           run.layer_count, source.layout.num_layers);
  }
  const auto blocks = static_cast<int64_t>(target.target_blocks.size());
  const int64_t end = int64_t{run.ordinal_begin} + static_cast<int64_t>(run.source_blocks.size());
  if (run.ordinal_begin < 0 || end > blocks) {
    return InvalidArgument("pushed ordinals [{}, {}) must be in [0, {})", run.ordinal_begin, end,
                           blocks);
  }
  return ValidateBlocks("source_blocks", run.source_blocks, source.num_blocks);
}

bool OutgoingTransfer::AnySent(const PushedRun& run) const {
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t i = 0; i < run.source_blocks.size(); ++i) {
      if (sent[Bit(layer, run.ordinal_begin + static_cast<int32_t>(i))]) return true;
    }
  }
  return false;
}

void OutgoingTransfer::MarkSent(const PushedRun& run) {
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t i = 0; i < run.source_blocks.size(); ++i) {
      sent[Bit(layer, run.ordinal_begin + static_cast<int32_t>(i))] = true;
    }
  }
  missing -= run.source_blocks.size() * static_cast<size_t>(run.layer_count);
}

void OutgoingTransfer::AddDigests(int32_t ordinal_begin, std::span<const uint64_t> run_digests) {
  for (size_t i = 0; i < run_digests.size(); ++i) {
    digests[static_cast<size_t>(ordinal_begin) + i] ^= run_digests[i];
  }
}

std::string OutgoingTransfer::DigestPayload() const {
  return std::string(reinterpret_cast<const char*>(digests.data()),
                     digests.size() * sizeof(uint64_t));
}

}  // namespace tandem::kvtransfer
