#include "decode_worker/speculation.h"

#include <algorithm>
#include <utility>

namespace tandem::decode {
namespace {

// One token to compute, behind the prompt; it may be pending.
bool IsDecodeStep(const Sequence& s) {
  const int length = s.length() + (s.token_pending() ? 1 : 0);
  return s.phase == SequencePhase::kRunnable && !s.closed && !s.paused() &&
         s.launched >= s.prompt_length && length - s.launched == 1 && length < s.max_length;
}

StepWork DecodeSteps(const RunningSet& running) {
  StepWork step;
  for (const auto& s : running.sequences()) {
    if (IsDecodeStep(*s)) step.AddRows(s->launched, 1);
  }
  return step;
}

}  // namespace

Speculation::Speculation(SpeculationOptions options, DecodeMetrics* metrics)
    : options_(std::move(options)), metrics_(metrics) {}

void Speculation::Propose(const RunningSet& running, const StepCost& cost) const {
  if (!enabled()) return;
  const StepWork step = DecodeSteps(running);
  for (const auto& s : running.sequences()) {
    if (s->speculated != nullptr) s->speculated->draft.tokens.clear();
    if (!IsDecodeStep(*s) || s->token_pending()) continue;
    Propose(s.get(), DraftPrice(cost, step, s->length()));
  }
}

bool Speculation::WantsTokens(const RunningSet& running, const StepCost& cost,
                              absl::Duration host_time) const {
  if (!enabled()) return false;
  const StepWork step = DecodeSteps(running);
  double gain = 0;
  bool any = false;
  for (const auto& s : running.sequences()) {
    if (!IsDecodeStep(*s) || !s->token_pending()) continue;
    Speculated& speculated = StateOf(s.get());
    // The first token of the draft is the one that is drawn already.
    const int most = std::min(options_.longest_draft + 1, s->max_length - s->length() - 1);
    const Draft draft = speculated.drafter->Propose(s->tokens, most);
    if (draft.tokens.empty()) continue;
    speculated.guess = {s->length(), draft.tokens.front(), draft.evidence};
    const double price = DraftPrice(cost, step, s->length());
    const int length =
        speculated.policy.Length(draft.evidence, price, static_cast<int>(draft.tokens.size()));
    if (length < 2) continue;
    any = true;
    gain += speculated.policy.Gain(draft.evidence, price, /*given=*/1, length);
  }
  const double step_ms = cost.Milliseconds(step);
  const double idle = step_ms > 0 ? absl::ToDoubleMilliseconds(host_time) / step_ms : 0;
  return any && gain >= idle * step.decode_steps;
}

Speculated& Speculation::StateOf(Sequence* s) const {
  if (s->speculated == nullptr) {
    s->speculated = std::make_unique<Speculated>();
    s->speculated->drafter = options_.drafter();
    s->speculated->seen_length = s->length();
  }
  Speculated& speculated = *s->speculated;
  speculated.policy.OnTokens(s->length() - std::exchange(speculated.seen_length, s->length()));
  if (const auto guess = speculated.guess; guess.has_value() && guess->position < s->length()) {
    const bool right = s->tokens[static_cast<size_t>(guess->position)] == guess->token;
    speculated.policy.OnVerified(guess->evidence, /*drafted=*/1, right ? 1 : 0);
    speculated.guess.reset();
  }
  return speculated;
}

void Speculation::Propose(Sequence* s, double price) const {
  Speculated& speculated = StateOf(s);
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
