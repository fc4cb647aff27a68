#include "engine/runtime/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/base/status.h"
#include "engine/kernels/log_softmax.h"
#include "engine/runtime/philox.h"

namespace tandem::engine {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

using Candidate = SamplerScratch::Candidate;

absl::StatusOr<RowMaximum> CheckedMaximum(std::span<const float> logits) {
  const RowMaximum maximum = FindMaximum(logits.data(), logits.size());
  if (maximum.has_nan) {
    return Internal(
        "the model's logits hold NaN: broken weights, or numbers beyond the range of "
        "its dtype");
  }
  if (std::isinf(maximum.value)) {
    return maximum.value > 0 ? Internal("the model's logits hold +inf")
                             : Internal("every token of the vocabulary is masked");
  }
  return maximum;
}

bool HasPenalties(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

void MaskEnds(const SampleContext& context, std::span<float> logits) {
  const SamplingParams& p = *context.params;
  const size_t generated = context.tokens.size() - context.prompt_length;
  if (p.min_tokens <= 0 || generated >= static_cast<size_t>(p.min_tokens)) return;
  const auto mask = [&](const std::vector<int32_t>& ids) {
    for (const int32_t id : ids) {
      if (id >= 0 && static_cast<size_t>(id) < logits.size()) {
        logits[static_cast<size_t>(id)] = kMasked;
      }
    }
  };
  if (!p.ignore_eos) mask(p.eos_token_ids);
  mask(p.stop_token_ids);
}

void ApplyPenalties(const SampleContext& context, std::span<float> logits,
                    SamplerScratch* scratch) {
  const SamplingParams& p = *context.params;
  scratch->output_counts.resize(logits.size());
  scratch->seen.resize(logits.size());
  scratch->touched.clear();
  for (size_t i = 0; i < context.tokens.size(); ++i) {
    const size_t id = static_cast<size_t>(context.tokens[i]);
    if (id >= logits.size()) continue;  // a padding row, or none at all
    if (!scratch->seen[id]) {
      scratch->seen[id] = 1;
      scratch->touched.push_back(static_cast<int32_t>(id));
    }
    if (i >= context.prompt_length) ++scratch->output_counts[id];
  }
  for (const int32_t token : scratch->touched) {
    const size_t id = static_cast<size_t>(token);
    float& logit = logits[id];
    logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
    logit = std::min(logit, std::numeric_limits<float>::max());  // a tiny penalty may overflow
    if (const int count = scratch->output_counts[id]; count > 0) {
      logit -= p.frequency_penalty * static_cast<float>(count);
      logit -= p.presence_penalty;
    }
    scratch->seen[id] = 0;
    scratch->output_counts[id] = 0;
  }
}

bool MoreLikely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

// Keeps the k largest logits, and what equals the smallest of them.
void KeepTopK(size_t k, std::vector<Candidate>* candidates) {
  if (k >= candidates->size()) return;
  const auto kth = candidates->begin() + static_cast<ptrdiff_t>(k - 1);
  std::nth_element(candidates->begin(), kth, candidates->end(), MoreLikely);
  const float least = kth->logit;
  std::erase_if(*candidates, [least](const Candidate& c) { return c.logit < least; });
}

// Keeps the most likely candidates up to and including the one that brings their share to `top_p`,
// most likely first. The tail is sorted only as far as it is needed.
void KeepTopP(double top_p, std::vector<Candidate>* candidates) {
  double total = 0;
  for (const Candidate& c : *candidates) total += c.weight;
  const double wanted = top_p * total;
  double sum = 0;
  size_t kept = 0, sorted = 0;
  while (kept < candidates->size() && (kept == 0 || sum < wanted)) {
    if (kept == sorted) {
      const size_t more = std::min(candidates->size(), std::max<size_t>(256, sorted * 4));
      const auto from = candidates->begin() + static_cast<ptrdiff_t>(sorted);
      std::partial_sort(from, candidates->begin() + static_cast<ptrdiff_t>(more), candidates->end(),
                        MoreLikely);
      sorted = more;
    }
    sum += (*candidates)[kept++].weight;
  }
  candidates->resize(kept);
}

int32_t Draw(const std::vector<Candidate>& candidates, double uniform) {
  double total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  const double target = uniform * total;
  double sum = 0;
  for (const Candidate& c : candidates) {
    sum += c.weight;
    if (sum > target) return c.token;
  }
  // Rounding may leave the target a hair beyond the sum: the last that has any weight.
  for (size_t i = candidates.size(); i-- > 1;) {
    if (candidates[i].weight > 0) return candidates[i].token;
  }
  return candidates.front().token;
}

int32_t DrawToken(std::span<const float> logits, float maximum, const SampleContext& context,
                  SamplerScratch* scratch) {
  const SamplingParams& p = *context.params;
  scratch->weights.resize(logits.size());
  ExpRow(logits.data(), logits.size(), maximum, 1.0f / p.temperature, scratch->weights.data());
  std::vector<Candidate>& candidates = scratch->candidates;
  candidates.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    // Relative to the most likely token's probability, whose weight is 1.
    if (scratch->weights[i] < p.min_p || logits[i] == kMasked) continue;
    candidates.push_back({static_cast<int32_t>(i), logits[i], scratch->weights[i]});
  }
  if (p.top_k > 0) KeepTopK(static_cast<size_t>(p.top_k), &candidates);
  if (p.top_p < 1.0f) KeepTopP(p.top_p, &candidates);
  // One order of summation, however the candidates were found.
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return Draw(candidates, UniformAt(p.seed, context.tokens.size()));
}

}  // namespace

absl::StatusOr<TokenLogprob> SampleToken(std::span<const float> logits,
                                         const SampleContext& context, SamplerScratch* scratch) {
  const SamplingParams& p = *context.params;
  TANDEM_ASSIGN_OR_RETURN(RowMaximum maximum, CheckedMaximum(logits));
  std::span<const float> adjusted = logits;
  if (HasPenalties(p) || p.min_tokens > 0) {
    scratch->logits.assign(logits.begin(), logits.end());
    MaskEnds(context, scratch->logits);
    if (HasPenalties(p)) ApplyPenalties(context, scratch->logits, scratch);
    adjusted = scratch->logits;
    TANDEM_ASSIGN_OR_RETURN(maximum, CheckedMaximum(adjusted));
  }
  const int32_t token = p.temperature < kGreedyTemperature
                            ? static_cast<int32_t>(maximum.index)
                            : DrawToken(adjusted, maximum.value, context, scratch);
  if (p.logprobs >= 0) return ScoreToken(logits, token, p.logprobs);
  TokenLogprob out;
  out.token = token;
  return out;
}

absl::StatusOr<TokenLogprob> ScoreToken(std::span<const float> logits, int32_t token,
                                        int alternatives) {
  if (token < 0 || static_cast<size_t>(token) >= logits.size()) {
    return InvalidArgument("token id {} is outside of the vocabulary of {}", token, logits.size());
  }
  TANDEM_ASSIGN_OR_RETURN(const RowMaximum maximum, CheckedMaximum(logits));
  const double normaliser = LogSumExp(logits.data(), logits.size(), maximum.value);
  const auto logprob = [&](int32_t id) {
    return static_cast<float>(static_cast<double>(logits[static_cast<size_t>(id)]) - normaliser);
  };
  TokenLogprob out;
  out.token = token;
  out.logprob = logprob(token);
  if (alternatives > 0) {
    for (const int32_t id :
         TopIndices(logits.data(), logits.size(), static_cast<size_t>(alternatives))) {
      out.top.push_back({id, logprob(id)});
    }
  }
  return out;
}

}  // namespace tandem::engine
