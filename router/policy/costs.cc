#include "router/policy/costs.h"

#include <algorithm>
#include <cmath>

namespace tandem::router {
namespace {

constexpr double kQuantumMs = 0.1;
// So many tokens of its own make a worker's rate count as much as the mean of all.
constexpr double kMeanCountsTokens = 1024;
// Of a pair whose link is refused: taken only where there is no other way, for then the attempt
// says what is wrong.
constexpr double kRefusedMs = 1e9;

}  // namespace

Costs::Costs(const CostPolicyOptions& options, const ClusterView& view, const RouteQuery& query)
    : options_(options), view_(view), query_(query) {
  double prefill_sum = 0, step_sum = 0;
  int prefill_known = 0, step_known = 0;
  double fastest_link = 0;
  for (const WorkerView& worker : view.workers) {
    fastest_link = std::max(fastest_link, worker.fastest_link);
    if (worker.load->prefill_tokens_per_second > 0) {
      prefill_sum += worker.load->prefill_tokens_per_second;
      ++prefill_known;
    }
    if (worker.load->decode_step_milliseconds > 0) {
      step_sum += worker.load->decode_step_milliseconds;
      ++step_known;
    }
  }
  for (const WorkerView& worker : view.workers) {
    promised_sequences_ += worker.load->promised_sequences;
    for (const auto& [id, tokens] : worker.load->prefill_backlog) {
      const int p = view.PlaceOf(id);
      if (p < 0) continue;
      backlog_.resize(view.workers.size());
      backlog_[static_cast<size_t>(p)] += tokens;
    }
  }
  default_prefill_rate_ =
      prefill_known > 0 ? prefill_sum / prefill_known : options.prior_prefill_tokens_per_second;
  default_step_ms_ = step_known > 0 ? step_sum / step_known : options.prior_decode_step_ms;
  default_link_rate_ = fastest_link > 0 ? fastest_link : options.prior_link_bytes_per_second;
}

bool Costs::Usable(int w) const {
  const WorkerView& worker = view_.workers[w];
  if (worker.draining || query_.excluded[w] == Exclusion::kLost) return false;
  // A worker may hold less than others (0: it has not said); a decode worker adds a token.
  const int most = worker.identity->max_model_len;
  return most == 0 || query_.prompt_tokens + (worker.prefills() ? 0 : 1) <= most;
}

bool Costs::HasRoom(int d, bool remote) const {
  const WorkerView& worker = view_.workers[d];
  if (query_.excluded[d] == Exclusion::kFull) return false;
  const int promised_sequences = remote ? 0 : worker.load->promised_sequences;
  if (Sequences(d) - promised_sequences >= worker.identity->max_num_seqs) return false;
  const bool known = worker.reported != absl::InfinitePast();
  const int64_t admits = known ? worker.load->admits_blocks : worker.identity->num_blocks;
  const int block_size = std::max(1, view_.block_size);
  const int64_t needed =
      std::max(1, query_.prompt_tokens / block_size + 1 - query_.cached_tokens[d] / block_size);
  const int64_t promised = remote ? worker.load->promised_blocks : 0;
  return needed + query_.routed[d].blocks + promised <= admits;
}

bool Costs::MayPrefillLocally(int d) const {
  const WorkerIdentity& identity = *view_.workers[d].identity;
  return identity.role == WorkerRole::kUnified || Uncached(d) <= identity.local_prefill_max_tokens;
}

int Costs::Uncached(int w) const {
  return std::max(1, query_.prompt_tokens - query_.cached_tokens[w]);
}

double Costs::PrefillRate(int w) const {
  const LoadReport& load = *view_.workers[w].load;
  const double rate = load.prefill_tokens_per_second, tokens = load.prefill_fit_tokens;
  if (rate <= 0) return default_prefill_rate_;
  if (tokens <= 0) return rate;
  return (tokens + kMeanCountsTokens) / (tokens / rate + kMeanCountsTokens / default_prefill_rate_);
}

int64_t Costs::QueuedTokens(int w) const {
  return view_.workers[w].load->waiting_tokens + query_.routed[w].prefill_tokens +
         (backlog_.empty() ? 0 : backlog_[static_cast<size_t>(w)]);
}

double Costs::QueueMs(int w) const {
  return static_cast<double>(QueuedTokens(w)) / PrefillRate(w) * 1e3;
}

double Costs::WaitMs(int w) const {
  const LoadReport& load = *view_.workers[w].load;
  if (load.saturated_tokens_per_second <= 0) return 0;
  const int prompts =
      load.running + load.waiting + query_.routed[w].sequences + promised_sequences_;
  const double overtaken = std::max(0, prompts) * (Uncached(w) * 4.0 / 3);
  return std::min(static_cast<double>(QueuedTokens(w)), overtaken) /
         load.saturated_tokens_per_second * 1e3;
}

double Costs::PrefillMs(int w) const { return Uncached(w) / PrefillRate(w) * 1e3; }

int Costs::Sequences(int d) const {
  const LoadReport& load = *view_.workers[d].load;
  return std::max(0, load.running + load.waiting + query_.routed[d].sequences);
}

double Costs::Occupancy(int d) const {
  const WorkerView& worker = view_.workers[d];
  const double sequences =
      static_cast<double>(Sequences(d)) / std::max(1, worker.identity->max_num_seqs);
  const double blocks = static_cast<double>(worker.load->blocks_used + query_.routed[d].blocks) /
                        std::max(1, worker.identity->num_blocks);
  return std::clamp(std::max(sequences, blocks), 0.0, 1.0);
}

double Costs::DecodePenaltyMs(int d) const {
  const double step = view_.workers[d].load->decode_step_milliseconds;
  return options_.decode_horizon_tokens * (step > 0 ? step : default_step_ms_) * Occupancy(d);
}

int Costs::Shipped(int d) const {
  return std::max(0, query_.prompt_tokens - query_.cached_tokens[d]);
}

double Costs::TransferMs(int tokens, double bytes_per_second) const {
  if (bytes_per_second <= 0) return kRefusedMs;
  return static_cast<double>(tokens) * static_cast<double>(view_.kv_bytes_per_token) /
         bytes_per_second * 1e3;
}

double Costs::LinkRate(int from, int to) const {
  const auto& links = view_.workers[from].load->links;
  const auto link = links.find(view_.workers[to].identity->id);
  if (link == links.end()) return default_link_rate_;
  if (link->second.refused) return 0;
  const double rate = link->second.bytes_per_second;
  return rate > 0 ? rate : default_link_rate_;
}

int Costs::Returnable(int p, int d) const {
  if (view_.workers[p].identity->kv_address.empty()) return 0;
  // Whole blocks, and the last token is computed.
  const int block_size = std::max(1, view_.block_size);
  const int most = (query_.prompt_tokens - 1) / block_size * block_size;
  return std::max(0, std::min(query_.cached_tokens[d], most) - query_.cached_tokens[p]);
}

int Costs::Returned(int p, int d) const {
  const int returnable = Returnable(p, d);
  const Links links = LinksOf(p, d);
  return RemoteMs(p, d, links, returnable) < RemoteMs(p, d, links, 0) ? returnable : 0;
}

double Costs::LocalMs(int d) const {
  const double stall = PrefillMs(d) * Occupancy(d);
  return QueueMs(d) + (1 + options_.burden) * PrefillMs(d) + stall + DecodePenaltyMs(d);
}

double Costs::RemoteMs(int p, int d, const Links& links, int returned) const {
  const double prefill = (Uncached(p) - returned) / PrefillRate(p) * 1e3;
  const double back =
      returned > 0 ? TransferMs(returned, links.to_prefill) + options_.remote_overhead_ms : 0;
  const double there = TransferMs(Shipped(d), links.to_decode);
  const double exposed = std::max(there - prefill, there / std::max(1, view_.num_layers));
  return QueueMs(p) + back + (1 + options_.burden) * prefill + exposed + DecodePenaltyMs(d) +
         options_.remote_overhead_ms;
}

double Costs::RemoteMs(int p, int d) const {
  const Links links = LinksOf(p, d);
  return std::min(RemoteMs(p, d, links, 0), RemoteMs(p, d, links, Returnable(p, d)));
}

double Costs::LeastRemoteMs(int p, int d) const {
  // Each of the two sums falls as links get faster.
  const Links links = {std::max(view_.workers[p].fastest_link, default_link_rate_),
                       default_link_rate_};
  return std::min(RemoteMs(p, d, links, 0), RemoteMs(p, d, links, Returnable(p, d)));
}

int64_t InQuanta(double cost_ms) { return std::llround(cost_ms / kQuantumMs); }

Candidate::Candidate(const RouteQuery& query, int decode, int prefill, double cost_ms)
    : decode(decode), prefill(prefill), cost_ms(cost_ms) {
  const bool remote = prefill >= 0;
  const uint64_t total = query.routed[decode].total + (remote ? query.routed[prefill].total : 0);
  const int shipped = remote ? std::max(0, query.prompt_tokens - query.cached_tokens[decode]) : 0;
  key = {InQuanta(cost_ms), shipped, total, decode, prefill};
}

}  // namespace tandem::router
