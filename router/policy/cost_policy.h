// Candidates -> filters -> cost in milliseconds -> choice.
//
// Stateless and thread-safe. For prefill worker p and decode worker d a request costs
//
//   queue(p) + prefill(uncached tokens on p) + exposed transfer(bytes not on d, link p->d)
//     + decode penalty(d) + remote overhead + burden
//
// where d may give p back what it holds of the prompt and p lacks (mostly the last turn's answer):
// then those tokens cost their transfer over d->p instead of prefill, if that is less;
//
// and where d may prefill by itself, one more candidate
//
//   queue(d) + prefill(uncached tokens on d) + stall of d's running sequences + decode penalty(d).
//
//   queue(w)     (waiting tokens in the last report + tokens routed since) / prefill rate(w)
//   exposed      blocks are shipped layer by layer during prefill, so only what prefill does not
//                hide is paid, and never less than the last layer: max(T - prefill, T / layers)
//   penalty(d)   decode_horizon_tokens steps, slower in proportion to how full d is
//   burden       a share of the prefill time, for the requests that will queue behind it: where the
//                link is what takes longest, a cached prefix is worth nothing to this request, but
//                it still is to the next
//   stall        while d prefills its sequences stand still: prefill time * how full d is
//
// Rates are the workers' own reports. One fitted on a few short prompts is mostly noise, and so the
// mean of all workers counts as a thousand tokens more that were computed at that rate: a fleet of
// fast and slow cards is priced as it is, and nobody by his first prompt. Until a worker has a
// rate, that mean, then a prior. A link that was not used yet counts as fast as the fastest that is
// known, so that a worker that has just come is tried, and measured; one that its sender refuses is
// the last resort. The longest cached prefix does
// not win by itself: it only shortens prefill and transfer, so a prefix that everyone shares cannot
// draw everyone to one worker.
#pragma once

#include "router/policy/routing_policy.h"

namespace tandem::router {

struct CostPolicyOptions {
  double prior_prefill_tokens_per_second = 2000;
  double prior_decode_step_ms = 20;
  double prior_link_bytes_per_second = 1e9;
  double remote_overhead_ms = 1.0;     // one more RPC, one more hop
  double decode_horizon_tokens = 128;  // how far ahead the load of a decode worker is charged
  double burden = 0.25;                // of prefill time
  int max_prefill_candidates = 3;      // the best and its stand-ins
};

class CostPolicy : public RoutingPolicy {
 public:
  explicit CostPolicy(const CostPolicyOptions& options = {}) : options_(options) {}
  absl::StatusOr<Route> Choose(const ClusterView& view, const RouteQuery& query) const override;

 private:
  const CostPolicyOptions options_;
};

}  // namespace tandem::router
