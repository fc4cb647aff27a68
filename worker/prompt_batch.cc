#include "worker/prompt_batch.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace tandem::worker {

PromptOrder::PromptOrder(std::span<const PromptView> prompts) {
  std::vector<int> order(prompts.size());
  std::iota(order.begin(), order.end(), 0);
  const auto view = [&](int i) -> const PromptView& { return prompts[static_cast<size_t>(i)]; };
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return std::tuple(-int64_t{view(a).priority}, view(a).remaining, view(a).arrival) <
           std::tuple(-int64_t{view(b).priority}, view(b).remaining, view(b).arrival);
  });
  turns_.reserve(order.size());
  for (const int i : order) {
    turns_.push_back({i, view(i).remaining});
    if (view(i).arrival < view(turns_[oldest_].prompt).arrival) oldest_ = turns_.size() - 1;
  }
}

std::vector<PromptChunk> PromptOrder::Share(const PromptLimits& limits) const {
  std::vector<PromptChunk> chunks;
  if (turns_.empty()) return chunks;
  int budget = limits.max_num_batched_tokens;
  const Turn& oldest = turns_[oldest_];
  chunks.push_back({oldest.prompt, std::min(oldest.remaining, std::max(1, budget / 4))});
  budget -= chunks[0].num_tokens;
  for (const Turn& turn : turns_) {
    if (budget == 0) break;
    if (&turn == &oldest) {
      const int more = std::min(turn.remaining - chunks[0].num_tokens, budget);
      chunks[0].num_tokens += more;
      budget -= more;
    } else if (static_cast<int>(chunks.size()) < limits.max_num_seqs) {
      const int tokens = std::min(turn.remaining, budget);
      chunks.push_back({turn.prompt, tokens});
      budget -= tokens;
    }
  }
  return chunks;
}

}  // namespace tandem::worker
