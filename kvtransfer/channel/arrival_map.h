// What of a transfer has arrived, page by page, and with which digests. Pure bookkeeping: it
// touches neither pool nor clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {

// Not thread-safe. Layers, ordinals and heads are within what the constructor was given.
class ArrivalMap {
 public:
  ArrivalMap(size_t num_blocks, int num_layers, const HeadRange& heads);

  bool Has(int layer, size_t ordinal, int head) const {
    return arrived_[Index(layer, ordinal, head)] != 0;
  }
  // Of any of `heads`.
  bool HasAny(int layer, size_t ordinal, const HeadRange& heads) const {
    const size_t first = Index(layer, ordinal, heads.begin);
    for (size_t i = first; i < first + static_cast<size_t>(heads.count); ++i) {
      if (arrived_[i] != 0) return true;
    }
    return false;
  }
  // K and V page of `head` are in the pool and have `digest`. Returns false, and changes nothing,
  // if they were there before.
  bool Add(int layer, size_t ordinal, int head, uint64_t digest);
  // The sender's digests of `heads`, one per block, over all layers. Returns false, and changes
  // nothing, if some of these heads were finished before.
  bool Finish(const HeadRange& heads, std::vector<uint64_t> digests);

  // Every page has arrived, and the sender has finished every head.
  bool Complete() const { return missing_ == 0 && unfinished_ == 0; }
  bool AllFinished() const { return unfinished_ == 0; }
  // The first block whose digest is not the sender's; -1 if all are right. Of a complete map.
  ptrdiff_t FirstMismatch() const;
  // Gives the memory back; nothing else may be asked afterwards.
  void Clear();

 private:
  struct Finished {
    HeadRange heads;
    std::vector<uint64_t> digests;  // [ordinal]
  };

  size_t HeadIndex(int head) const { return static_cast<size_t>(head - heads_.begin); }
  size_t Index(int layer, size_t ordinal, int head) const {
    return (static_cast<size_t>(layer) * num_blocks_ + ordinal) *
               static_cast<size_t>(heads_.count) +
           HeadIndex(head);
  }

  const size_t num_blocks_;
  const HeadRange heads_;
  size_t missing_;                 // pages that have not arrived (K and V count once)
  int unfinished_;                 // heads
  std::vector<uint8_t> arrived_;   // [layer][ordinal][head]: 0 or 1
  std::vector<uint64_t> digests_;  // [ordinal][head], over the layers that arrived
  std::vector<Finished> finished_;
};

}  // namespace tandem::kvtransfer
