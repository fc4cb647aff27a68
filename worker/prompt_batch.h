// How the prompts of one batch share its tokens, on a prefill worker and beside the decode steps of
// a unified one alike. Pure functions over values: no clock, pool or model.
//
// The rule for B tokens:
//   1. The oldest prompt gets up to B / 4 tokens (at least one), whatever its length and priority.
//   2. The rest goes to the others and to it, in the order: higher priority, fewer remaining
//      tokens, older; each gets all it needs as long as there is budget.
//
// So nobody starves. A short prompt that comes while a 30k one is computed finds three quarters of
// every batch free of it. A long prompt advances at least with what shorter ones leave, and as the
// oldest by B / 4 per batch whatever arrives; every prompt becomes the oldest, because the ones
// before it end after at most ceil(4 * remaining / B) batches each. And prompts of one length come
// out one after the other: sharing evenly would hold the first back until the last is done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tandem::worker {

struct PromptLimits {
  int max_num_batched_tokens = 2048;  // >= 1
  int max_num_seqs = 64;              // prompts in one batch, >= 1
};

struct PromptView {
  int remaining = 0;     // tokens still to compute, >= 1
  int priority = 0;      // higher is scheduled earlier
  uint64_t arrival = 0;  // grows with time; unique
};

struct PromptChunk {
  int prompt = 0;  // index into the view
  int num_tokens = 0;
};

// Prompts in the order of the rule, for who asks several times how a batch would be.
class PromptOrder {
 public:
  explicit PromptOrder(std::span<const PromptView> prompts);

  // At most one chunk per prompt. Empty only if there are none.
  std::vector<PromptChunk> Share(const PromptLimits& limits) const;

 private:
  struct Turn {
    int prompt = 0;  // index into the view
    int remaining = 0;
  };
  std::vector<Turn> turns_;
  size_t oldest_ = 0;  // its place in `turns_`
};

inline std::vector<PromptChunk> NextPromptBatch(std::span<const PromptView> prompts,
                                                const PromptLimits& limits) {
  return PromptOrder(prompts).Share(limits);
}

}  // namespace tandem::worker
