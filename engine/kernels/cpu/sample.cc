#include "engine/kernels/cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/kernels/cpu/log_softmax.h"
#include "engine/kernels/draw_weight.h"
#include "engine/kernels/philox.h"

namespace tandem::engine {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();

using Candidate = DrawScratch::Candidate;

DrawStatus StatusOf(const RowMaximum& maximum) {
  if (maximum.has_nan) return DrawStatus::kNan;
  if (!std::isinf(maximum.value)) return DrawStatus::kOk;
  return maximum.value > 0 ? DrawStatus::kInfinite : DrawStatus::kAllMasked;
}

bool HasPenalties(const DrawSpec& s) {
  return s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f;
}

void Mask(const DrawSpec& spec, const int32_t* token_lists, std::vector<float>* logits) {
  for (int32_t i = spec.masked_begin; i < spec.masked_end; ++i) {
    const int32_t id = token_lists[i];
    if (id >= 0 && static_cast<size_t>(id) < logits->size()) {
      (*logits)[static_cast<size_t>(id)] = kMasked;
    }
  }
}

void ApplyPenalties(const DrawSpec& spec, const int32_t* token_lists, const int32_t* drawn_before,
                    DrawScratch* scratch) {
  std::vector<float>& logits = scratch->logits;
  scratch->output_counts.resize(logits.size());
  scratch->seen.resize(logits.size());
  scratch->touched.clear();
  for (int32_t i = spec.history_begin; i < spec.history_end; ++i) {
    const size_t id = static_cast<size_t>(ResolveId(token_lists[i], drawn_before));
    if (id >= logits.size()) continue;  // a padding row
    if (!scratch->seen[id]) {
      scratch->seen[id] = 1;
      scratch->touched.push_back(static_cast<int32_t>(id));
    }
    if (i >= spec.output_begin) ++scratch->output_counts[id];
  }
  for (const int32_t token : scratch->touched) {
    const size_t id = static_cast<size_t>(token);
    float& logit = logits[id];
    logit = logit > 0 ? logit / spec.repetition_penalty : logit * spec.repetition_penalty;
    logit = std::min(logit, std::numeric_limits<float>::max());  // a tiny penalty may overflow
    if (const int count = scratch->output_counts[id]; count > 0) {
      logit -= spec.frequency_penalty * static_cast<float>(count);
      logit -= spec.presence_penalty;
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

// Keeps the most likely candidates up to and including the one that brings their sum to the
// nucleus, most likely first. The tail is sorted only as far as it is needed.
void KeepTopP(float top_p, std::vector<Candidate>* candidates) {
  uint64_t total = 0;
  for (const Candidate& c : *candidates) total += c.weight;
  const uint64_t wanted = NucleusWeight(total, top_p);
  uint64_t sum = 0;
  size_t kept = 0, sorted = 0;
  while (kept < candidates->size() && sum < wanted) {
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
  uint64_t total = 0;
  for (const Candidate& c : candidates) total += c.weight;
  const uint64_t target = DrawTarget(total, uniform);
  uint64_t sum = 0;
  for (const Candidate& c : candidates) {
    sum += c.weight;
    if (sum > target) return c.token;
  }
  return candidates.back().token;  // not reached: the target is below the total
}

int32_t DrawToken(const float* logits, size_t vocab, float maximum, const DrawSpec& spec,
                  DrawScratch* scratch) {
  const float scale = DrawScale(spec.temperature);
  // Tokens without weight cannot be drawn. The most likely one has full weight: it always stays.
  const uint64_t least = std::clamp<uint64_t>(LeastWeight(spec.min_p), 1, kFullWeight);
  std::vector<Candidate>& candidates = scratch->candidates;
  candidates.clear();
  if (spec.top_k > 0) {
    // Weights grow with logits, so it is the same whether min_p or top_k comes first.
    for (size_t i = 0; i < vocab; ++i) {
      if (logits[i] != kMasked) candidates.push_back({static_cast<int32_t>(i), logits[i], 0});
    }
    KeepTopK(static_cast<size_t>(spec.top_k), &candidates);
    for (Candidate& c : candidates) c.weight = DrawWeight(c.logit, maximum, scale);
    std::erase_if(candidates, [least](const Candidate& c) { return c.weight < least; });
  } else {
    for (size_t i = 0; i < vocab; ++i) {
      const uint64_t weight = DrawWeight(logits[i], maximum, scale);
      if (weight >= least) candidates.push_back({static_cast<int32_t>(i), logits[i], weight});
    }
  }
  if (spec.top_p < 1.0f) KeepTopP(spec.top_p, &candidates);
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  return Draw(candidates, UniformAt(spec.seed, static_cast<uint64_t>(spec.position)));
}

// The log probabilities of `token` and of the most likely ones.
DrawResult Score(const float* logits, size_t vocab, float maximum, int32_t token,
                 int alternatives) {
  DrawResult result;
  result.token = token;
  const double normaliser = LogSumExp(logits, vocab, maximum);
  const auto logprob = [&](int32_t id) {
    return static_cast<float>(static_cast<double>(logits[static_cast<size_t>(id)]) - normaliser);
  };
  result.logprob = logprob(token);
  const int wanted = std::min(alternatives, kMaxAlternatives);
  if (wanted <= 0) return result;
  for (const int32_t id : TopIndices(logits, vocab, static_cast<size_t>(wanted))) {
    result.alternatives[result.num_alternatives] = id;
    result.alternative_logprobs[result.num_alternatives++] = logprob(id);
  }
  return result;
}

}  // namespace

DrawResult DrawRow(const float* logits, size_t vocab, const DrawSpec& spec,
                   const int32_t* token_lists, const int32_t* drawn_before, DrawScratch* scratch) {
  DrawResult result;
  const RowMaximum maximum = FindMaximum(logits, vocab);
  result.status = StatusOf(maximum);
  if (spec.scored >= 0 && static_cast<size_t>(spec.scored) >= vocab) {
    result.token = spec.scored;
    result.status = DrawStatus::kOutOfVocabulary;
  }
  if (result.status != DrawStatus::kOk) return result;
  if (spec.scored >= 0) {
    return Score(logits, vocab, maximum.value, spec.scored, spec.alternatives);
  }
  const float* adjusted = logits;
  RowMaximum top = maximum;
  if (HasPenalties(spec) || spec.masked_end > spec.masked_begin) {
    scratch->logits.assign(logits, logits + vocab);
    Mask(spec, token_lists, &scratch->logits);
    if (HasPenalties(spec)) ApplyPenalties(spec, token_lists, drawn_before, scratch);
    adjusted = scratch->logits.data();
    top = FindMaximum(adjusted, vocab);
    result.status = StatusOf(top);
    if (result.status != DrawStatus::kOk) return result;
  }
  result.token = spec.temperature < kGreedyTemperature
                     ? static_cast<int32_t>(top.index)
                     : DrawToken(adjusted, vocab, top.value, spec, scratch);
  if (spec.alternatives < 0) return result;
  return Score(logits, vocab, maximum.value, result.token, spec.alternatives);
}

}  // namespace tandem::engine
