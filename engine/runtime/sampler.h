// Between what a request asks (SamplingParams) and what the ops draw (DrawSpec, DrawResult).
//
// Order of steps (that of vLLM 0.9, whose flags users know): ends masked below min_tokens;
// repetition, frequency, presence penalties; then greedy choice if the temperature is 0, else
// temperature, min_p, top_k, top_p, and one draw. Log probabilities are of the model's own
// distribution, before all of these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "absl/status/statusor.h"

#include "engine/kernels/ops.h"
#include "engine/runtime/batch.h"
#include "engine/runtime/sampling_params.h"

namespace tandem::engine {

// Token ids that specs point into, one after the other; there is room for what is appended.
struct TokenLists {
  int32_t* data = nullptr;
  int32_t size = 0;

  void Append(std::span<const int32_t> ids) {
    std::copy(ids.begin(), ids.end(), data + size);
    size += static_cast<int32_t>(ids.size());
  }
};

// What the draws of `item`, one more than its draft has tokens, append at most.
size_t MaxListTokens(const SamplingParams& params, const BatchItem& item);

// How the token behind the first `drafted` tokens of `item`'s draft is drawn: as if there were no
// others. Masked tokens and, where a penalty needs them, the
// sequence's tokens are appended to `lists`, which the spec points into.
DrawSpec MakeDrawSpec(const SamplingParams& params, const BatchItem& item, size_t drafted,
                      TokenLists* lists);

// Internal error if the logits held NaN or +inf, or if every token was masked: never a garbage
// token. InvalidArgument for a scored token outside of the `valid_vocab` ids.
absl::StatusOr<TokenLogprob> ReadDraw(const DrawResult& result, int valid_vocab);

}  // namespace tandem::engine
