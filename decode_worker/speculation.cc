#include "decode_worker/speculation.h"

#include <algorithm>
#include <utility>

namespace tandem::decode {
namespace {

// One known token to compute, behind the prompt.
bool IsDecodeStep(const Sequence& s) {
  return s.phase == SequencePhase::kRunnable && !s.closed && !s.paused() && !s.token_pending() &&
         s.launched >= s.prompt_length && s.length() - s.launched == 1;
}

}  // namespace

Speculation::Speculation(SpeculationOptions options, DecodeMetrics* metrics)
    : options_(std::move(options)), metrics_(metrics) {}

void Speculation::Propose(const RunningSet& running, const StepCost& cost) const {
  if (!enabled()) return;
  StepWork step;
  for (const auto& s : running.sequences()) {
    if (s->speculated != nullptr) s->speculated->draft.tokens.clear();
    if (IsDecodeStep(*s)) step.AddRows(s->launched, 1);
  }
  for (const auto& s : running.sequences()) {
    if (IsDecodeStep(*s)) Propose(s.get(), DraftPrice(cost, step, s->length()));
  }
}

void Speculation::Propose(Sequence* s, double price) const {
  if (s->speculated == nullptr) {
    s->speculated = std::make_unique<Speculated>();
    s->speculated->drafter = options_.drafter();
    s->speculated->seen_length = s->length();
  }
  Speculated& speculated = *s->speculated;
  speculated.policy.OnTokens(s->length() - std::exchange(speculated.seen_length, s->length()));
  // The token behind the draft is drawn in the same step.
  const int most = std::min(options_.longest_draft, s->max_length - s->length() - 1);
  Draft& draft = speculated.draft;
  draft = speculated.drafter->Propose(s->tokens, most);
  if (draft.tokens.empty()) return;
  const int count = static_cast<int>(draft.tokens.size());
  draft.tokens.resize(static_cast<size_t>(speculated.policy.Length(draft.evidence, price, count)));
}

void Speculation::OnVerified(Sequence* s, int drafted, int accepted) const {
  s->speculated->policy.OnVerified(s->speculated->draft.evidence, drafted, accepted);
  s->drafts.Add({drafted, accepted});
  metrics_->drafted_tokens.Increment(drafted);
  metrics_->accepted_tokens.Increment(accepted);
}

}  // namespace tandem::decode
