// Speculative decoding in the loop: which sequences have tokens drafted, and what came of it.
//
// The model draws a token in front of each drafted one, from its own distribution and with that
// position's random numbers, and the draft's token is accepted while the draw is the same. So a
// request gets the tokens that it would have got without (docs/adr/010).
//
// A draft continues tokens that the host knows. Where the loop launches steps ahead, the last one
// is still on the device when the next step is planned; so where a draft is likely to pay, the loop
// collects what is in flight first, and the device is idle for the host's time between two steps.
// What the token on the device was guessed to be tells the policy as much as a draft does that was
// computed: guesses that are mostly wrong are soon not waited for.
//
// Not thread-safe: part of the loop.
#pragma once

#include "absl/time/time.h"

#include "decode_worker/decode_metrics.h"
#include "decode_worker/drafter.h"
#include "decode_worker/running_set.h"
#include "decode_worker/step_cost.h"

namespace tandem::decode {

struct SpeculationOptions {
  DrafterFactory drafter;  // empty: no speculation
  int longest_draft = 16;  // tokens
};

class Speculation {
 public:
  Speculation(SpeculationOptions options, DecodeMetrics* metrics);

  bool enabled() const { return options_.drafter != nullptr; }
  // Whether drafts behind tokens that steps in flight draw are expected to bring more than the
  // device, idle for `host_time` until they are known, would.
  bool WantsTokens(const RunningSet& running, const StepCost& cost, absl::Duration host_time) const;
  // Drafts for all sequences whose next step is a decode step from a known token; `cost` is what
  // steps take.
  void Propose(const RunningSet& running, const StepCost& cost) const;
  // Of a draft of `sequence`, `drafted` tokens were computed and `accepted` of them drawn.
  void OnVerified(Sequence* sequence, int drafted, int accepted) const;

 private:
  // Whatever is known of the sequence is brought up to date.
  Speculated& StateOf(Sequence* sequence) const;
  void Propose(Sequence* sequence, double price) const;

  const SpeculationOptions options_;
  DecodeMetrics* const metrics_;
};

}  // namespace tandem::decode
