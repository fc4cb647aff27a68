#include "common/rpc/pending_blocks.h"

#include <iterator>
#include <utility>

namespace tandem {

using internal::v1::BlockEvents;

void PendingBlocks::Note(const std::string& hash, bool stored) {
  const auto it = last_.find(hash);
  if (it == last_.end()) {
    order_.push_back({hash, stored});
    last_.emplace(order_.back().hash, std::prev(order_.end()));
    return;
  }
  it->second->stored = stored;
  order_.splice(order_.end(), order_, it->second);
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
  BlockEvents out;
  out.set_cleared(std::exchange(cleared_, false));
  for (; max_hashes > 0 && !order_.empty(); --max_hashes) {
    Change& change = order_.front();
    last_.erase(change.hash);
    (change.stored ? out.add_stored() : out.add_removed())->swap(change.hash);
    order_.pop_front();
  }
  return out;
}

void PendingBlocks::Clear() {
  last_.clear();
  order_.clear();
  cleared_ = false;
}

}  // namespace tandem
