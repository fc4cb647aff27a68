// The terms of CostPolicy's sum (cost_policy.h explains them), for one request and one view.
//
// Pure. A worker is named by its place in the view. Made for one choice, which it must not outlive.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "router/policy/cost_policy.h"

namespace tandem::router {

class Costs {
 public:
  Costs(const CostPolicyOptions& options, const ClusterView& view, const RouteQuery& query);

  // ---- filters ----
  bool Usable(int w) const;
  // The worker alone knows what it can evict, what is in quarantine and what its sequences take
  // next, so its own word counts; one that has not spoken yet has all its blocks. `remote`: for a
  // prompt that is computed elsewhere, which what it promised to others of that kind is no room
  // for.
  bool HasRoom(int d, bool remote) const;
  bool MayPrefillLocally(int d) const;

  // ---- terms ----
  // At least one: the last prompt token is always computed, its logits are the first token.
  int Uncached(int w) const;
  double QueueMs(int w) const;
  // As QueueMs, of what comes before this request: shorter prompts overtake longer ones, but for
  // the quarter of each batch that is the oldest's. Requests are refused by it, so it rests on
  // nothing but how fast this worker's queue was seen to go down; 0 until then.
  double WaitMs(int w) const;
  double PrefillMs(int w) const;
  double DecodePenaltyMs(int d) const;
  // Tokens of KV that d lacks.
  int Shipped(int d) const;
  // Leading tokens that p lacks and d gives back to it, because that is faster than to compute
  // them.
  int Returned(int p, int d) const;

  // ---- sums ----
  double LocalMs(int d) const;
  double RemoteMs(int p, int d) const;
  // No more than RemoteMs for any decode worker in d's place that holds as much.
  double LeastRemoteMs(int p, int d) const;

 private:
  // Bytes per second between a prefill and a decode worker; 0: refused.
  struct Links {
    double to_decode, to_prefill;
  };
  double PrefillRate(int w) const;
  int64_t QueuedTokens(int w) const;
  // How full a decode worker is, 0..1: by sequences or by blocks, whichever is scarcer.
  double Occupancy(int d) const;
  int Sequences(int d) const;
  double TransferMs(int tokens, double bytes_per_second) const;
  double LinkRate(int from, int to) const;
  Links LinksOf(int p, int d) const { return {LinkRate(p, d), LinkRate(d, p)}; }
  // Leading tokens that p lacks and d could give back.
  int Returnable(int p, int d) const;
  // Where d gives back so many of them.
  double RemoteMs(int p, int d, const Links& links, int returned) const;

  const CostPolicyOptions& options_;
  const ClusterView& view_;
  const RouteQuery& query_;
  double default_prefill_rate_;
  double default_step_ms_;
  double default_link_rate_;
  // By place in the view: prompt tokens that decode workers will ask for. Empty: none.
  std::vector<int64_t> backlog_;
  int promised_sequences_ = 0;  // of all decode workers
};

// One way to serve the request.
struct Candidate {
  Candidate(const RouteQuery& query, int decode, int prefill, double cost_ms);

  int decode;
  int prefill;  // -1: local
  double cost_ms;
  // Lower is better: cost, tokens that would have to be shipped, requests ever sent there, place in
  // the view (worker id).
  std::tuple<int64_t, int, uint64_t, int, int> key;
};

// Costs closer than a quantum of 0.1 ms count as equal, so that noise in the rates does not decide.
int64_t InQuanta(double cost_ms);

}  // namespace tandem::router
