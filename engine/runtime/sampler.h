// From a row of logits to a token.
//
// Order of steps (that of vLLM 0.9, whose flags users know): ends masked below min_tokens;
// repetition, frequency, presence penalties; then greedy choice if the temperature is 0, else
// temperature, min_p, top_k, top_p, and one draw. Log probabilities are of the model's own
// distribution, before all of these.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

#include "engine/runtime/batch.h"
#include "engine/runtime/sampling_params.h"

namespace tandem::engine {

// Temperatures below this are greedy.
inline constexpr float kGreedyTemperature = 1e-5f;

// What a draw depends on besides the logits.
struct SampleContext {
  std::span<const int32_t> tokens;  // the sequence so far; the draw is at position tokens.size()
  size_t prompt_length = 0;         // how many of them are prompt
  const SamplingParams* params = nullptr;
};

// Memory of one thread, so that nothing is allocated per token.
struct SamplerScratch {
  struct Candidate {
    int32_t token;
    float logit;
    double weight;
  };
  std::vector<float> logits;           // [vocab]
  std::vector<float> weights;          // [vocab]
  std::vector<int32_t> output_counts;  // [vocab], zero between calls
  std::vector<char> seen;              // [vocab], zero between calls
  std::vector<int32_t> touched;
  std::vector<Candidate> candidates;
};

// Draws the next token. `logits` holds the valid vocabulary only (padding rows are cut off by the
// caller). Ties: the lowest token id. Internal error if the logits hold NaN or +inf, or if every
// token is masked: never a garbage token.
absl::StatusOr<TokenLogprob> SampleToken(std::span<const float> logits,
                                         const SampleContext& context, SamplerScratch* scratch);

// The log probability of a given token, with the `alternatives` most likely ones. Errors as above.
absl::StatusOr<TokenLogprob> ScoreToken(std::span<const float> logits, int32_t token,
                                        int alternatives);

}  // namespace tandem::engine
