// Between what a request asks (SamplingParams) and what the ops draw (DrawSpec, DrawResult).
//
// Order of steps (that of vLLM 0.9, whose flags users know): ends masked below min_tokens;
// repetition, frequency, presence penalties; then greedy choice if the temperature is 0, else
// temperature, min_p, top_k, top_p, and one draw. Log probabilities are of the model's own
// distribution, before all of these.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"

#include "engine/kernels/ops.h"
#include "engine/runtime/batch.h"
#include "engine/runtime/sampling_params.h"

namespace tandem::engine {

// How the token after `item`'s last is drawn. Masked tokens and, where a penalty needs them, the
// sequence's tokens are appended to `token_lists`, which the spec points into.
DrawSpec MakeDrawSpec(const SamplingParams& params, const BatchItem& item,
                      std::vector<int32_t>* token_lists);

// Internal error if the logits held NaN or +inf, or if every token was masked: never a garbage
// token. InvalidArgument for a scored token outside of the `valid_vocab` ids.
absl::StatusOr<TokenLogprob> ReadDraw(const DrawResult& result, int valid_vocab);

}  // namespace tandem::engine
