// The flags that chat and generate share: how tokens are drawn.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/config/flags.h"
#include "tandem/v1/inference.pb.h"

namespace tandem::cli {

// What is not given is left to the server. Ranges are the server's to check.
struct SamplingFlags {
  std::optional<double> temperature, top_p, min_p;
  std::optional<double> repetition_penalty, presence_penalty, frequency_penalty;
  std::optional<int64_t> top_k;
  std::optional<uint64_t> max_tokens, min_tokens, seed, logprobs, prompt_logprobs;
  std::vector<std::string> stop;
  bool ignore_eos = false;

  void AddTo(FlagSet* flags);
  v1::SamplingParams ToProto() const;
};

}  // namespace tandem::cli
