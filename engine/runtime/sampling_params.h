// How one request wants its tokens drawn. Plain values, already validated by the router.
#pragma once

#include <cstdint>
#include <vector>

#include "common/base/sampling_ranges.h"

namespace tandem::engine {

struct SamplingParams {
  float temperature = 1.0f;  // 0: greedy
  float top_p = 1.0f;
  int top_k = 0;  // <= 0: off
  float min_p = 0.0f;
  float repetition_penalty =
      1.0f;                        // over prompt and output (Keskar et al., 2019, arXiv:1909.05858)
  float presence_penalty = 0.0f;   // over output
  float frequency_penalty = 0.0f;  // over output
  uint64_t seed = 0;  // with the token's position, the whole state of the random generator
  int max_tokens = 1;
  int min_tokens = 0;                   // ends are masked before
  std::vector<int32_t> eos_token_ids;   // end the sequence unless ignore_eos
  std::vector<int32_t> stop_token_ids;  // end the sequence always
  bool ignore_eos = false;
  int logprobs =
      -1;  // alternatives per token, 0..kMaxLogprobs; -1: none, not even the chosen one's
  int prompt_logprobs = -1;  // the same for prompt tokens
};

}  // namespace tandem::engine
