#include "common/rpc/pending_blocks.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace tandem {

using internal::v1::BlockEvents;

void PendingBlocks::Note(const std::string& hash, bool stored) {
  last_[hash] = Change{.sequence = next_sequence_++, .stored = stored};
}

void PendingBlocks::Merge(const BlockEvents& events) {
  if (events.cleared()) {
    Clear();
    cleared_ = true;
  }
  for (const std::string& hash : events.stored()) Note(hash, true);
  for (const std::string& hash : events.removed()) Note(hash, false);
}

std::optional<BlockEvents> PendingBlocks::Take(size_t max_hashes) {
  if (empty()) return std::nullopt;
  std::vector<std::pair<uint64_t, std::string>> order;
  order.reserve(last_.size());
  for (const auto& [hash, change] : last_) order.emplace_back(change.sequence, hash);
  std::sort(order.begin(), order.end());
  if (order.size() > max_hashes) order.resize(max_hashes);

  BlockEvents out;
  out.set_cleared(std::exchange(cleared_, false));
  for (const auto& [sequence, hash] : order) {
    const auto found = last_.find(hash);
    (found->second.stored ? out.add_stored() : out.add_removed())->assign(hash);
    last_.erase(found);
  }
  return out;
}

void PendingBlocks::Clear() {
  last_.clear();
  cleared_ = false;
}

}  // namespace tandem
