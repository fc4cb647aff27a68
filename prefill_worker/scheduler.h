// Which prompts the prefill worker computes next, and how much of each. Pure functions over values:
// no clock, pool, model, gRPC or metrics.
//
// The rule for one batch of at most B = max_num_batched_tokens tokens:
//   1. The oldest prompt gets up to B / 4 tokens (at least one), whatever its length and priority.
//   2. The rest goes to the others and to it, in the order: higher priority, fewer remaining
//      tokens, older; each gets all it needs as long as there is budget.
//
// So nobody starves. A short prompt that comes while a 30k one is computed finds three quarters of
// every batch free of it. A long prompt advances at least with what shorter ones leave, and as the
// oldest by B / 4 per batch whatever arrives; every prompt becomes the oldest, because the ones
// before it end after at most ceil(4 * remaining / B) batches each.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tandem::prefill {

struct Limits {
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

// At most one chunk per prompt. Empty only if `prompts` is.
std::vector<PromptChunk> NextBatch(std::span<const PromptView> prompts, const Limits& limits);

struct WaitingView {
  int new_blocks = 0;    // that it would take from the available ones
  int times_passed = 0;  // prompts behind it that were admitted while it waited for blocks
};

// A prompt that waits for blocks is passed by at most so many later ones that fit; then they wait
// until it got its blocks.
inline constexpr int kMaxTimesPassed = 64;

// Which of the waiting prompts (in the order of their turn) get their blocks now, as indices in
// order.
std::vector<int> NextAdmissions(std::span<const WaitingView> waiting, int available_blocks);

}  // namespace tandem::prefill
