#include "prefill_worker/waiting_prompts.h"

#include <algorithm>
#include <utility>

#include "common/base/kv_layout.h"
#include "prefill_worker/scheduler.h"

namespace tandem::prefill {
namespace {

// Prompts looked at per turn: finding their cached blocks costs time.
constexpr size_t kWindow = 128;

}  // namespace

int64_t WaitingPrompts::num_tokens() const {
  int64_t total = 0;
  for (const Sequence* s : prompts_) total += s->length();
  return total;
}

void WaitingPrompts::Insert(Sequence* sequence) {
  const auto place = [](const Sequence* s) {
    return std::pair(-int64_t{s->work.priority}, s->work.id);
  };
  const auto behind = std::upper_bound(
      prompts_.begin(), prompts_.end(), sequence,
      [&](const Sequence* one, const Sequence* other) { return place(one) < place(other); });
  prompts_.insert(behind, sequence);
}

void WaitingPrompts::Remove(const Sequence* sequence) { std::erase(prompts_, sequence); }

std::vector<Sequence*> WaitingPrompts::Choose(const engine::PrefixCache& cache,
                                              int available_blocks) {
  std::vector<Sequence*> chosen;
  if (available_blocks == 0) return chosen;  // its last block at least is new to every prompt
  const int block_size = cache.block_size();
  std::vector<WaitingView> view;
  for (size_t i = 0; i < std::min(prompts_.size(), kWindow); ++i) {
    Sequence& s = *prompts_[i];
    const int cached =
        cache.CountMatch(s.hash_seed, s.work.tokens, s.MaxCachedBlocks(block_size), &s.known);
    view.push_back({BlocksFor(s.length(), block_size) - cached + s.known.num_idle, s.times_passed});
  }
  const std::vector<int> admitted = NextAdmissions(view, available_blocks);
  if (admitted.empty()) return chosen;
  for (const int i : admitted) chosen.push_back(prompts_[static_cast<size_t>(i)]);
  for (int i = 0; i < admitted.back(); ++i) ++prompts_[static_cast<size_t>(i)]->times_passed;
  return chosen;
}

}  // namespace tandem::prefill
