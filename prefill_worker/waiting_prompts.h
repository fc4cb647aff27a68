// The prompts that wait for blocks, in the order of their turn.
//
// Not thread-safe: part of the loop.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/kv/prefix_cache.h"
#include "prefill_worker/sequence.h"

namespace tandem::prefill {

class WaitingPrompts {
 public:
  size_t size() const { return prompts_.size(); }
  int64_t num_tokens() const;

  // Behind all of a higher priority, and of the same that arrived before it.
  void Insert(Sequence* sequence);
  void Remove(const Sequence* sequence);
  // Those that get their blocks now, where `available_blocks` are there, in order; they are not
  // removed. Prompts that others pass take note of it.
  std::vector<Sequence*> Choose(const engine::PrefixCache& cache, int available_blocks);

 private:
  std::vector<Sequence*> prompts_;
};

}  // namespace tandem::prefill
