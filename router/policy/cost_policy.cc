#include "router/policy/cost_policy.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::router {
namespace {

// Costs closer than this count as equal, so that noise in the rates does not decide.
constexpr double kCostQuantumMs = 0.1;

// Everything that one choice reads, with the rates resolved.
class Costs {
 public:
  Costs(const CostPolicyOptions& options, const ClusterView& view, const RouteQuery& query)
      : options_(options), view_(view), query_(query) {
    double prefill_sum = 0, step_sum = 0;
    int prefill_known = 0, step_known = 0;
    for (const WorkerView& worker : view.workers) {
      if (worker.load->prefill_tokens_per_second > 0) {
        prefill_sum += worker.load->prefill_tokens_per_second;
        ++prefill_known;
      }
      if (worker.load->decode_step_milliseconds > 0) {
        step_sum += worker.load->decode_step_milliseconds;
        ++step_known;
      }
    }
    default_prefill_rate_ =
        prefill_known > 0 ? prefill_sum / prefill_known : options.prior_prefill_tokens_per_second;
    default_step_ms_ = step_known > 0 ? step_sum / step_known : options.prior_decode_step_ms;
  }

  // At least one: the last prompt token is always computed, its logits are the first token.
  int Uncached(int w) const { return std::max(1, query_.prompt_tokens - query_.cached_tokens[w]); }

  double QueueMs(int w) const {
    const int64_t tokens = view_.workers[w].load->waiting_tokens + query_.routed[w].prefill_tokens;
    return static_cast<double>(tokens) / PrefillRate(w) * 1e3;
  }

  double PrefillMs(int w) const { return Uncached(w) / PrefillRate(w) * 1e3; }

  double ExposedTransferMs(int p, int d) const {
    const int tokens = std::max(0, query_.prompt_tokens - query_.cached_tokens[d]);
    const auto& links = view_.workers[p].load->link_bytes_per_second;
    const auto link = links.find(view_.workers[d].identity->id);
    const double rate = link != links.end() && link->second > 0
                            ? link->second
                            : options_.prior_link_bytes_per_second;
    const double total_ms =
        static_cast<double>(tokens) * static_cast<double>(view_.kv_bytes_per_token) / rate * 1e3;
    return std::max(total_ms - PrefillMs(p), total_ms / std::max(1, view_.num_layers));
  }

  // How full a decode worker is, 0..1: by sequences or by blocks, whichever is scarcer.
  double Occupancy(int d) const {
    const WorkerView& worker = view_.workers[d];
    const double sequences =
        static_cast<double>(Sequences(d)) / std::max(1, worker.identity->max_num_seqs);
    const double blocks = static_cast<double>(worker.load->blocks_used + query_.routed[d].blocks) /
                          std::max(1, worker.identity->num_blocks);
    return std::clamp(std::max(sequences, blocks), 0.0, 1.0);
  }

  double DecodePenaltyMs(int d) const {
    const double step = view_.workers[d].load->decode_step_milliseconds;
    return options_.decode_horizon_tokens * (step > 0 ? step : default_step_ms_) * Occupancy(d);
  }

  int Sequences(int d) const {
    const LoadReport& load = *view_.workers[d].load;
    return std::max(0, load.running + load.waiting + query_.routed[d].sequences);
  }

  bool Usable(int w) const {
    return !view_.workers[w].draining && query_.excluded[w] != Exclusion::kLost;
  }

  // The worker alone knows what it can evict, what is in quarantine and what its sequences take
  // next, so its own word counts; one that has not spoken yet has all its blocks.
  bool HasRoom(int d) const {
    const WorkerView& worker = view_.workers[d];
    if (query_.excluded[d] == Exclusion::kFull) return false;
    if (Sequences(d) >= worker.identity->max_num_seqs) return false;
    const bool known = worker.reported != absl::InfinitePast();
    const int64_t admits = known ? worker.load->admits_blocks : worker.identity->num_blocks;
    const int block_size = std::max(1, view_.block_size);
    const int64_t needed =
        std::max(1, query_.prompt_tokens / block_size + 1 - query_.cached_tokens[d] / block_size);
    return needed + query_.routed[d].blocks <= admits;
  }

  bool MayPrefillLocally(int d) const {
    const WorkerIdentity& identity = *view_.workers[d].identity;
    return identity.role == WorkerRole::kUnified ||
           Uncached(d) <= identity.local_prefill_max_tokens;
  }

 private:
  double PrefillRate(int w) const {
    const double rate = view_.workers[w].load->prefill_tokens_per_second;
    if (rate <= 0) return default_prefill_rate_;
    return std::clamp(rate, default_prefill_rate_ / 2, default_prefill_rate_ * 2);
  }

  const CostPolicyOptions& options_;
  const ClusterView& view_;
  const RouteQuery& query_;
  double default_prefill_rate_;
  double default_step_ms_;
};

struct Candidate {
  int decode = -1;
  int prefill = -1;  // -1: local
  double cost_ms = 0;
  // Lower is better: cost, tokens that would have to be shipped, requests ever sent there, place in
  // the view (worker id).
  std::tuple<int64_t, int, uint64_t, int, int> key;
};

Candidate MakeCandidate(const RouteQuery& query, int decode, int prefill, double cost_ms) {
  const uint64_t total =
      query.routed[decode].total + (prefill >= 0 ? query.routed[prefill].total : 0);
  const int shipped =
      prefill >= 0 ? std::max(0, query.prompt_tokens - query.cached_tokens[decode]) : 0;
  return {decode,
          prefill,
          cost_ms,
          {std::llround(cost_ms / kCostQuantumMs), shipped, total, decode, prefill}};
}

std::vector<Candidate> PriceAll(const CostPolicyOptions& options, const ClusterView& view,
                                const RouteQuery& query, const Costs& costs,
                                std::span<const int> decode, std::span<const int> prefill) {
  std::vector<Candidate> out;
  for (const int d : decode) {
    const double penalty = costs.DecodePenaltyMs(d);
    if (costs.MayPrefillLocally(d)) {
      const double stall = costs.PrefillMs(d) * costs.Occupancy(d);
      out.push_back(MakeCandidate(
          query, d, -1,
          costs.QueueMs(d) + (1 + options.burden) * costs.PrefillMs(d) + stall + penalty));
    }
    if (view.workers[d].identity->role == WorkerRole::kUnified) continue;
    for (const int p : prefill) {
      out.push_back(MakeCandidate(query, d, p,
                                  costs.QueueMs(p) + (1 + options.burden) * costs.PrefillMs(p) +
                                      costs.ExposedTransferMs(p, d) + penalty +
                                      options.remote_overhead_ms));
    }
  }
  return out;
}

Route::Worker ToRouteWorker(const WorkerView& worker) {
  return {worker.identity->id, worker.identity->address};
}

Route ToRoute(const CostPolicyOptions& options, const ClusterView& view, const RouteQuery& query,
              const Costs& costs, std::vector<Candidate> candidates) {
  std::sort(candidates.begin(), candidates.end(),
            [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
  const Candidate& best = candidates.front();
  const WorkerView& decode = view.workers[best.decode];
  Route route;
  route.decode = ToRouteWorker(decode);
  route.incarnation = decode.identity->incarnation;
  route.reported = decode.reported;
  route.cost_ms = best.cost_ms;
  const int computes_at = best.prefill >= 0 ? best.prefill : best.decode;
  route.predicted_cached_tokens =
      std::min(query.cached_tokens[computes_at], std::max(0, query.prompt_tokens - 1));
  route.uncached_tokens = costs.Uncached(computes_at);
  if (best.prefill >= 0) {
    for (const Candidate& candidate : candidates) {
      if (candidate.decode != best.decode || candidate.prefill < 0) continue;
      route.prefill.push_back(ToRouteWorker(view.workers[candidate.prefill]));
      if (std::ssize(route.prefill) >= options.max_prefill_candidates) break;
    }
  }
  route.reason =
      fmt::format("{} on {}: {:.1f} ms, {} of {} tokens cached there",
                  best.prefill >= 0 ? "prefill" : "local", view.workers[computes_at].identity->id,
                  best.cost_ms, route.predicted_cached_tokens, query.prompt_tokens);
  return route;
}

}  // namespace

absl::StatusOr<Route> CostPolicy::Choose(const ClusterView& view, const RouteQuery& query) const {
  const size_t n = view.workers.size();
  TANDEM_CHECK(
      query.cached_tokens.size() == n && query.routed.size() == n && query.excluded.size() == n,
      "a query for {} workers, a view of {}", query.routed.size(), n);
  const Costs costs(options_, view, query);
  std::vector<int> decode, prefill;
  bool any_full = false;
  for (int w = 0; w < static_cast<int>(n); ++w) {
    if (!costs.Usable(w)) continue;
    if (view.workers[w].prefills()) {
      prefill.push_back(w);
    } else if (costs.HasRoom(w)) {
      decode.push_back(w);
    } else {
      any_full = true;
    }
  }
  std::vector<Candidate> candidates = PriceAll(options_, view, query, costs, decode, prefill);
  if (!candidates.empty()) return ToRoute(options_, view, query, costs, std::move(candidates));
  if (any_full) return ResourceExhausted("every decode worker is full");
  if (decode.empty()) return Unavailable("no decode worker is ready");
  return Unavailable("no prefill worker is ready");
}

}  // namespace tandem::router
