#include "decode_worker/ngram_drafter.h"

namespace tandem::decode {
namespace {

static_assert(NgramDrafter::kShortestMatch == 2, "a key holds two tokens");
uint64_t PairThatEndsAt(std::span<const int32_t> tokens, size_t end) {
  return uint64_t{static_cast<uint32_t>(tokens[end - 1])} << 32 |
         static_cast<uint32_t>(tokens[end]);
}

// How many tokens up to `a` and up to `b` agree, where a < b.
int Agreement(std::span<const int32_t> tokens, int a, int b) {
  int count = 0;
  while (count <= a && count < NgramDrafter::kLongestMatch &&
         tokens[static_cast<size_t>(a - count)] == tokens[static_cast<size_t>(b - count)]) {
    ++count;
  }
  return count;
}

}  // namespace

void NgramDrafter::KeepUp(std::span<const int32_t> tokens) {
  if (before_.empty()) before_.push_back(-1);  // position 0 ends no pair
  for (size_t end = before_.size(); end + 1 < tokens.size(); ++end) {
    const auto [it, inserted] =
        last_.try_emplace(PairThatEndsAt(tokens, end), static_cast<int32_t>(end));
    before_.push_back(inserted ? -1 : it->second);
    it->second = static_cast<int32_t>(end);
  }
}

Draft NgramDrafter::Propose(std::span<const int32_t> tokens, int most) {
  KeepUp(tokens);
  Draft draft;
  if (most <= 0 || tokens.size() <= kShortestMatch) return draft;
  const int end = static_cast<int>(tokens.size()) - 1;
  const auto it = last_.find(PairThatEndsAt(tokens, tokens.size() - 1));
  if (it == last_.end()) return draft;
  int best = -1;
  int candidates = kCandidates;
  for (int at = it->second; at >= 0 && candidates > 0; --candidates) {
    const int agreement = Agreement(tokens, at, end);
    if (agreement > draft.evidence) {
      draft.evidence = agreement;
      best = at;
    }
    if (agreement == kLongestMatch) break;
    at = before_[static_cast<size_t>(at)];
  }
  draft.tokens.reserve(static_cast<size_t>(most));
  for (int i = 0; i < most; ++i) {
    const size_t from = static_cast<size_t>(best + 1 + i);
    draft.tokens.push_back(from < tokens.size() ? tokens[from]
                                                : draft.tokens[from - tokens.size()]);
  }
  return draft;
}

}  // namespace tandem::decode
