#include "worker/prompt_batch.h"

#include <algorithm>
#include <numeric>
#include <tuple>

namespace tandem::worker {

std::vector<PromptChunk> NextPromptBatch(std::span<const PromptView> prompts,
                                         const PromptLimits& limits) {
  std::vector<PromptChunk> chunks;
  if (prompts.empty()) return chunks;
  std::vector<int> order(prompts.size());
  std::iota(order.begin(), order.end(), 0);
  const auto view = [&](int i) -> const PromptView& { return prompts[static_cast<size_t>(i)]; };
  const int oldest = *std::min_element(
      order.begin(), order.end(), [&](int a, int b) { return view(a).arrival < view(b).arrival; });
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return std::tuple(-int64_t{view(a).priority}, view(a).remaining, view(a).arrival) <
           std::tuple(-int64_t{view(b).priority}, view(b).remaining, view(b).arrival);
  });

  int budget = limits.max_num_batched_tokens;
  const int share = std::min(view(oldest).remaining, std::max(1, budget / 4));
  chunks.push_back({oldest, share});
  budget -= share;
  for (const int i : order) {
    if (budget == 0) break;
    if (i == oldest) {
      const int more = std::min(view(i).remaining - chunks[0].num_tokens, budget);
      chunks[0].num_tokens += more;
      budget -= more;
    } else if (static_cast<int>(chunks.size()) < limits.max_num_seqs) {
      const int tokens = std::min(view(i).remaining, budget);
      chunks.push_back({i, tokens});
      budget -= tokens;
    }
  }
  return chunks;
}

}  // namespace tandem::worker
