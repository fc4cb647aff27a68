// A pair of workers costs what the prefill worker costs, what the decode worker costs, and the
// transfer between them. To decode workers that lack equally many tokens only the link makes a
// difference in the last term, so within such a group the best pair is, but for the links, the best
// prefill worker with the best decode worker. That is why only a short list of each is paired: with
// up to kShortlist of either all pairs that could win are priced; with more, the choice is the best
// of all but for what links of different speed, and ties of more workers than the list is long,
// could still make of those left out. cost_policy_test.cc holds it against the price of every pair.
#include "router/policy/cost_policy.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

#include "common/base/check.h"
#include "common/base/refusal.h"
#include "common/base/status.h"
#include "router/policy/costs.h"

namespace tandem::router {
namespace {

constexpr size_t kShortlist = 16;

// A worker in one of the two places, with the part of the sum that it alone decides.
struct Half {
  int worker;
  double ms;
  uint64_t total;  // requests ever sent there

  bool operator<(const Half& other) const {
    return std::tie(ms, total, worker) < std::tie(other.ms, other.total, other.worker);
  }
};

void Shorten(std::vector<Half>* halves) {
  if (halves->size() <= kShortlist) return;
  std::nth_element(halves->begin(), halves->begin() + kShortlist, halves->end());
  halves->resize(kShortlist);
}

class Search {
 public:
  Search(const ClusterView& view, const RouteQuery& query, const Costs& costs)
      : view_(view), query_(query), costs_(costs) {}

  std::optional<Candidate> Best(std::span<const int> decode, std::span<const int> prefill) {
    std::vector<int> remote;
    for (const int d : decode) {
      if (costs_.MayPrefillLocally(d)) Offer(d, -1, costs_.LocalMs(d));
      const bool unified = view_.workers[d].identity->role == WorkerRole::kUnified;
      if (!unified && costs_.HasRoom(d, /*remote=*/true)) remote.push_back(d);
    }
    if (prefill.empty() || remote.empty()) return best_;
    std::stable_sort(remote.begin(), remote.end(),
                     [&](int a, int b) { return costs_.Shipped(a) < costs_.Shipped(b); });
    for (size_t begin = 0, end; begin < remote.size(); begin = end) {
      end = begin + 1;
      while (end < remote.size() && costs_.Shipped(remote[end]) == costs_.Shipped(remote[begin])) {
        ++end;
      }
      SearchGroup(std::span(remote).subspan(begin, end - begin), prefill);
    }
    return best_;
  }

 private:
  void Offer(int d, int p, double ms) {
    const Candidate candidate(query_, d, p, ms);
    if (!best_ || candidate.key < best_->key) best_ = candidate;
  }

  bool MayWin(double least_ms) const {
    return !best_ || InQuanta(least_ms) <= std::get<0>(best_->key);
  }

  // `decode` lack equally many tokens.
  void SearchGroup(std::span<const int> decode, std::span<const int> prefill) {
    std::vector<Half> ds, ps;
    for (const int d : decode) {
      ds.push_back({d, costs_.DecodePenaltyMs(d), query_.routed[d].total});
    }
    const int cheapest = std::min_element(ds.begin(), ds.end())->worker;
    for (const int p : prefill) {
      const double ms = costs_.LeastRemoteMs(p, cheapest);
      if (MayWin(ms)) ps.push_back({p, ms, query_.routed[p].total});
    }
    if (ps.empty()) return;
    Shorten(&ps);
    Shorten(&ds);
    std::sort(ps.begin(), ps.end());
    std::sort(ds.begin(), ds.end());
    for (const Half& d : ds) {
      if (!MayWin(costs_.LeastRemoteMs(ps.front().worker, d.worker))) return;
      for (const Half& p : ps) {
        if (!MayWin(costs_.LeastRemoteMs(p.worker, d.worker))) break;
        Offer(d.worker, p.worker, costs_.RemoteMs(p.worker, d.worker));
      }
    }
  }

  const ClusterView& view_;
  const RouteQuery& query_;
  const Costs& costs_;
  std::optional<Candidate> best_;
};

// The prefill workers for one decode worker, best first, up to `count`.
std::vector<Candidate> PrefillsFor(const RouteQuery& query, const Costs& costs, int decode,
                                   std::span<const int> prefill, int count) {
  std::vector<Half> halves;
  for (const int p : prefill) {
    halves.push_back({p, costs.LeastRemoteMs(p, decode), query.routed[p].total});
  }
  Shorten(&halves);
  std::vector<Candidate> out;
  for (const Half& half : halves) {
    out.emplace_back(query, decode, half.worker, costs.RemoteMs(half.worker, decode));
  }
  const size_t kept = std::min(out.size(), static_cast<size_t>(std::max(1, count)));
  std::partial_sort(out.begin(), out.begin() + static_cast<ptrdiff_t>(kept), out.end(),
                    [](const Candidate& a, const Candidate& b) { return a.key < b.key; });
  out.erase(out.begin() + static_cast<ptrdiff_t>(kept), out.end());
  return out;
}

Route::Worker ToRouteWorker(const WorkerView& worker) {
  const WorkerIdentity& identity = *worker.identity;
  return {.id = identity.id,
          .incarnation = identity.incarnation,
          .address = identity.address,
          .kv_address = identity.kv_address,
          .vouch_key = identity.vouch_key};
}

Route ToRoute(const CostPolicyOptions& options, const ClusterView& view, const RouteQuery& query,
              const Costs& costs, Candidate best, std::span<const int> prefill) {
  const WorkerView& decode = view.workers[best.decode];
  Route route;
  route.decode = ToRouteWorker(decode);
  route.reported = decode.reported;
  int returned = 0;
  if (best.prefill >= 0) {
    const std::vector<Candidate> ranked =
        PrefillsFor(query, costs, best.decode, prefill, options.max_prefill_candidates);
    for (const Candidate& candidate : ranked) {
      const WorkerView& worker = view.workers[candidate.prefill];
      route.prefill.push_back(ToRouteWorker(worker));
      if (costs.Returned(candidate.prefill, best.decode) > 0) {
        route.prefill.back().return_address = worker.identity->kv_address;
      }
    }
    best = ranked.front();
    returned = costs.Returned(best.prefill, best.decode);
  }
  route.cost_ms = best.cost_ms;
  const int computes_at = best.prefill >= 0 ? best.prefill : best.decode;
  route.predicted_cached_tokens =
      std::min(query.cached_tokens[computes_at] + returned, std::max(0, query.prompt_tokens - 1));
  route.uncached_tokens = costs.Uncached(computes_at) - returned;
  route.wait_ms = costs.WaitMs(computes_at);
  route.reason =
      fmt::format("{} on {}: {:.1f} ms, {} of {} tokens cached there",
                  best.prefill >= 0 ? "prefill" : "local", view.workers[computes_at].identity->id,
                  best.cost_ms, route.predicted_cached_tokens - returned, query.prompt_tokens);
  if (returned > 0) route.reason += fmt::format(", {} come back", returned);
  return route;
}

}  // namespace

absl::StatusOr<Route> CostPolicy::Choose(const ClusterView& view, const RouteQuery& query) const {
  const size_t n = view.workers.size();
  TANDEM_CHECK(
      query.cached_tokens.size() == n && query.routed.size() == n && query.excluded.size() == n,
      "a query for {} workers, a view of {}", query.routed.size(), n);
  const Costs costs(options_, view, query);
  std::vector<int> decode, prefill, suspect;
  bool any_full = false;
  for (int w = 0; w < static_cast<int>(n); ++w) {
    if (!costs.Usable(w)) continue;
    if (view.workers[w].prefills()) {
      (query.excluded[w] == Exclusion::kSuspect ? suspect : prefill).push_back(w);
    } else if (costs.HasRoom(w, /*remote=*/false)) {
      decode.push_back(w);
    } else {
      any_full = true;
    }
  }
  if (prefill.empty()) prefill = std::move(suspect);
  const std::optional<Candidate> best = Search(view, query, costs).Best(decode, prefill);
  if (best) return ToRoute(options_, view, query, costs, *best, prefill);
  if (!decode.empty() && !prefill.empty()) {
    return WithRefusal(ResourceExhausted("what room there is waits for prefill workers"),
                       {.reason = Refusal::Reason::kPrefill});
  }
  if (any_full) return ResourceExhausted("every decode worker is full");
  if (decode.empty()) return Unavailable("no decode worker is ready");
  return Unavailable("no prefill worker is ready");
}

}  // namespace tandem::router
