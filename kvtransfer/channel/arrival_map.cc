#include "kvtransfer/channel/arrival_map.h"

#include <utility>

namespace tandem::kvtransfer {

ArrivalMap::ArrivalMap(size_t num_blocks, int num_layers, const HeadRange& heads)
    : num_blocks_(num_blocks),
      heads_(heads),
      missing_(num_blocks * static_cast<size_t>(num_layers) * static_cast<size_t>(heads.count)),
      unfinished_(heads.count),
      arrived_(missing_, 0),
      digests_(num_blocks * static_cast<size_t>(heads.count), 0) {}

bool ArrivalMap::Add(int layer, size_t ordinal, int head, uint64_t digest) {
  const size_t index = Index(layer, ordinal, head);
  if (arrived_[index] != 0) return false;
  arrived_[index] = 1;
  digests_[ordinal * static_cast<size_t>(heads_.count) + HeadIndex(head)] ^= digest;
  --missing_;
  return true;
}

bool ArrivalMap::Finish(const HeadRange& heads, std::vector<uint64_t> digests) {
  for (const Finished& earlier : finished_) {
    if (Intersect(earlier.heads, heads).count > 0) return false;
  }
  unfinished_ -= heads.count;
  finished_.push_back({heads, std::move(digests)});
  return true;
}

ptrdiff_t ArrivalMap::FirstMismatch() const {
  for (size_t ordinal = 0; ordinal < num_blocks_; ++ordinal) {
    for (const Finished& finished : finished_) {
      uint64_t digest = 0;
      for (int head = finished.heads.begin; head < finished.heads.end(); ++head) {
        digest ^= digests_[ordinal * static_cast<size_t>(heads_.count) + HeadIndex(head)];
      }
      if (digest != finished.digests[ordinal]) return static_cast<ptrdiff_t>(ordinal);
    }
  }
  return -1;
}

void ArrivalMap::Clear() {
  arrived_ = {};
  digests_ = {};
  finished_ = {};
}

}  // namespace tandem::kvtransfer
