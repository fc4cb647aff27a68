#include "cli/sampling_flags.h"

#include <algorithm>
#include <limits>

namespace tandem::cli {
namespace {

// The nearest value that the field can hold: what lies beyond is out of the server's range too, and
// the server says so.
template <typename Field, typename Value>
Field Clamp(Value value) {
  return static_cast<Field>(
      std::clamp<Value>(value, static_cast<Value>(std::numeric_limits<Field>::min()),
                        static_cast<Value>(std::numeric_limits<Field>::max())));
}

}  // namespace

void SamplingFlags::AddTo(FlagSet* flags) {
  flags->Add("--max-tokens", &max_tokens, "tokens to generate at most", "tokens");
  flags->Add("--min-tokens", &min_tokens, "no end and no stop before these", "tokens");
  flags->Add("--temperature", &temperature, "0 is greedy");
  flags->Add("--top-p", &top_p, "smallest set of tokens of this probability");
  flags->Add("--top-k", &top_k, "most likely tokens to choose from; 0: all", "tokens");
  flags->Add("--min-p", &min_p, "least probability, as a part of the greatest");
  flags->Add("--repetition-penalty", &repetition_penalty, "divides the logits of tokens seen");
  flags->Add("--presence-penalty", &presence_penalty, "taken off the logits of tokens generated");
  flags->Add("--frequency-penalty", &frequency_penalty, "the same, times how often");
  flags->Add("--seed", &seed, "same seed, same answer");
  flags->AddRepeated("--stop", &stop, "text to end before");
  flags->Add("--ignore-eos", &ignore_eos, "go on after the end-of-sequence token");
  flags->Add("--logprobs", &logprobs, "alternatives to report for each token", "tokens");
  flags->Add("--prompt-logprobs", &prompt_logprobs, "the same for the prompt", "tokens");
}

v1::SamplingParams SamplingFlags::ToProto() const {
  v1::SamplingParams out;
  if (temperature) out.set_temperature(static_cast<float>(*temperature));
  if (top_p) out.set_top_p(static_cast<float>(*top_p));
  if (min_p) out.set_min_p(static_cast<float>(*min_p));
  if (repetition_penalty) out.set_repetition_penalty(static_cast<float>(*repetition_penalty));
  if (presence_penalty) out.set_presence_penalty(static_cast<float>(*presence_penalty));
  if (frequency_penalty) out.set_frequency_penalty(static_cast<float>(*frequency_penalty));
  if (top_k) out.set_top_k(Clamp<int32_t>(*top_k));
  if (max_tokens) out.set_max_tokens(Clamp<uint32_t>(*max_tokens));
  if (min_tokens) out.set_min_tokens(Clamp<uint32_t>(*min_tokens));
  if (seed) out.set_seed(*seed);
  if (logprobs) out.set_logprobs(Clamp<uint32_t>(*logprobs));
  if (prompt_logprobs) out.set_prompt_logprobs(Clamp<uint32_t>(*prompt_logprobs));
  for (const std::string& text : stop) out.add_stop(text);
  out.set_ignore_eos(ignore_eos);
  return out;
}

}  // namespace tandem::cli
