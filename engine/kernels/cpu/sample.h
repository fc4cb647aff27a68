// From one row of logits to a token, or to the log probability of a given one.
//
// Order of steps (that of vLLM 0.9, whose flags users know): ends masked below min_tokens;
// repetition, frequency, presence penalties; then greedy choice if the temperature is 0, else
// temperature, min_p, top_k, top_p, and one draw. Log probabilities are of the model's own
// distribution, before all of these. Ties: the lowest token id.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/kernels/ops.h"

namespace tandem::engine {

// Memory of one thread, so that nothing is allocated per token.
struct DrawScratch {
  struct Candidate {
    int32_t token;
    float logit;
    uint64_t weight;
  };
  std::vector<float> logits;           // [vocab]
  std::vector<int32_t> output_counts;  // [vocab], zero between calls
  std::vector<char> seen;              // [vocab], zero between calls
  std::vector<int32_t> touched;
  std::vector<Candidate> candidates;
};

// What `spec` asks of `logits`: [vocab], the valid vocabulary only. token_lists and drawn_before as
// in SampleArgs. Never a garbage token: what cannot be drawn is a status.
DrawResult DrawRow(const float* logits, size_t vocab, const DrawSpec& spec,
                   const int32_t* token_lists, const int32_t* drawn_before, DrawScratch* scratch);

}  // namespace tandem::engine
