// A launched batch's own copy of its inputs, so that the loop may change its sequences meanwhile.
#pragma once

#include <vector>

#include "engine/runtime/batch.h"

namespace tandem::engine {

// Movable; the spans of batch() stay valid.
class BatchCopy {
 public:
  explicit BatchCopy(const Batch& batch);

  // Spans and pointers lead into this object's memory.
  const Batch& batch() const { return batch_; }
  // `item` had a pending token: it is known now, and nothing is pending any more.
  void SetPending(size_t item, int32_t token);

 private:
  struct Memory {
    std::vector<int32_t> tokens;  // with room for the pending one
    std::vector<int32_t> draft;
    std::vector<int32_t> blocks;
    SamplingParams sampling;
  };
  Batch batch_;
  std::vector<Memory> memory_;  // [items]
};

}  // namespace tandem::engine
