// Drafts that are mostly right, for a model whose text repeats nothing.
#pragma once

#include <algorithm>
#include <functional>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "decode_worker/drafter.h"

namespace tandem::decode {

class OracleDrafter final : public Drafter {
 public:
  // `whole` gives a text that begins with the given tokens; where it has none, or errs, the draft
  // is wrong.
  using Whole = std::function<std::vector<int32_t>(std::span<const int32_t> tokens)>;
  // A token of `wrong_percent` of the drafts is made a wrong one.
  OracleDrafter(Whole whole, int wrong_percent, uint32_t seed)
      : whole_(std::move(whole)), wrong_percent_(wrong_percent), random_(seed) {}

  Draft Propose(std::span<const int32_t> tokens, int most) override {
    Draft draft;
    const std::vector<int32_t> whole = whole_(tokens);
    const size_t length = tokens.size();
    for (size_t i = length; i < length + static_cast<size_t>(std::max(0, most)); ++i) {
      draft.tokens.push_back(i < whole.size() ? whole[i] : static_cast<int32_t>(i % 7));
    }
    if (!draft.tokens.empty() && static_cast<int>(random_() % 100) < wrong_percent_) {
      int32_t& token = draft.tokens[random_() % draft.tokens.size()];
      token = token == 0 ? 1 : token - 1;
    }
    draft.evidence = static_cast<int>(1 + random_() % 20);
    return draft;
  }

 private:
  const Whole whole_;
  const int wrong_percent_;
  std::mt19937 random_;
};

}  // namespace tandem::decode
