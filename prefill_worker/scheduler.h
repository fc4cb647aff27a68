// Which of the prompts that wait get their blocks. How those that have them share a batch stands in
// worker/prompt_batch.h. Pure functions over values: no clock, pool, model, gRPC or metrics.
#pragma once

#include <span>
#include <vector>

namespace tandem::prefill {

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
