// The queue is walked from its head at every turn. That is cheap, because a request that finds
// every worker full ends the routing for all that need as much or more, and of the smaller ones
// only kMaxPassing are asked for: the others are only looked at for their time limits. What a turn
// costs is therefore one policy call per request that leaves, plus a few.
#include "router/dispatch/dispatcher.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/refusal.h"
#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

constexpr absl::Duration kRetryAfter = absl::Seconds(1);
constexpr absl::Duration kLongestRetryAfter = absl::Seconds(30);
// Requests that are full in one turn before the others are not asked for.
constexpr int kMaxPassing = 8;

// How long a prefill worker is avoided after so many failures in a row: one request finds out
// whether it is back, and the next wait is twice as long.
absl::Duration SuspectFor(int failures) {
  constexpr absl::Duration kFirst = absl::Seconds(1), kLongest = absl::Seconds(30);
  return std::min(kLongest, kFirst * (1 << std::clamp(failures - 1, 0, 10)));
}

int64_t Size(const Dispatchable& request) { return std::ssize(request.prompt().tokens); }

}  // namespace

Dispatcher::Dispatcher(DispatcherOptions options, const Registry* registry,
                       const PrefixIndex* index, const RoutingPolicy* policy,
                       RouterMetrics* metrics, Clock* clock)
    : options_(std::move(options)),
      registry_(registry),
      index_(index),
      policy_(policy),
      metrics_(metrics),
      clock_(clock),
      // Submit bounds the queue by itself, so the inbox refuses nothing.
      inbox_(std::numeric_limits<size_t>::max()) {}

Dispatcher::~Dispatcher() {
  TakeNotes(inbox_.Drain(absl::ZeroDuration()));
  for (const Queued& queued : queue_) {
    queued.request->Fail(Unavailable("the router is shutting down"));
  }
}

absl::Status Dispatcher::MayJoin(int priority, absl::Time deadline) const {
  TANDEM_RETURN_IF_ERROR(CheckRoom(queued_));
  return CheckWait(priority, deadline, wait_.Behind(queued_, queued_tokens_), clock_->Now());
}

absl::Status Dispatcher::CheckRoom(int queued) const {
  if (queued < options_.max_queued_requests) return absl::OkStatus();
  return WithRetryAfter(
      ResourceExhausted("the queue is full: {} requests wait (--max-queued-requests)", queued),
      kRetryAfter);
}

absl::Status Dispatcher::Submit(std::shared_ptr<Dispatchable> request, Ticket* ticket) {
  const RoutablePrompt prompt = request->prompt();
  TANDEM_RETURN_IF_ERROR(MayJoin(prompt.priority, prompt.deadline));
  const int64_t tokens = std::ssize(prompt.tokens);
  const int before = queued_.fetch_add(1);
  const int64_t tokens_before = queued_tokens_.fetch_add(tokens);
  absl::Status room = CheckRoom(before);
  // One request is always taken, however long.
  if (room.ok() && before > 0 && tokens_before + tokens > options_.max_queued_tokens) {
    room = WithRetryAfter(
        ResourceExhausted("the queue is full: {} prompt tokens wait (--max-queued-tokens)",
                          tokens_before),
        kRetryAfter);
  }
  if (!room.ok()) {
    --queued_;
    queued_tokens_ -= tokens;
    return room;
  }
  metrics_->waiting.Increment();
  *ticket = ++last_ticket_;
  Queued queued;
  queued.request = std::move(request);
  queued.ticket = *ticket;
  queued.since = clock_->Now();
  inbox_.Push(std::move(queued));
  return absl::OkStatus();
}

void Dispatcher::Requeue(std::shared_ptr<Dispatchable> request, Ticket ticket, absl::Time since,
                         Retries retries) {
  CountQueued(+1, Size(*request));
  Queued queued;
  queued.request = std::move(request);
  queued.ticket = ticket;
  queued.since = since;
  queued.retries = std::move(retries);
  inbox_.Push(std::move(queued));
}

void Dispatcher::Ended(Ticket ticket) { inbox_.Push(EndedNote{ticket}); }

void Dispatcher::CountQueued(int requests, int64_t tokens) {
  queued_ += requests;
  queued_tokens_ += tokens;
  metrics_->waiting.Increment(requests);
}

void Dispatcher::Step(absl::Duration wait) {
  const absl::Time before = clock_->Now();
  TakeNotes(inbox_.Drain(std::min(wait, NextTimeLimit(before) - before)));
  RouteAll(clock_->Now());
}

void Dispatcher::TakeNotes(std::vector<Note> notes) {
  for (Note& note : notes) {
    if (auto* queued = std::get_if<Queued>(&note)) {
      // A request that comes back has left the worker that the ledger holds it against.
      ledger_.Remove(queued->ticket);
      Insert(std::move(*queued));
      continue;
    }
    const Ticket ticket = std::get<EndedNote>(note).ticket;
    ledger_.End(ticket, clock_->Now());
    const auto it = std::find_if(queue_.begin(), queue_.end(),
                                 [&](const Queued& queued) { return queued.ticket == ticket; });
    if (it == queue_.end()) continue;
    CountQueued(-1, -it->size);
    queue_.erase(it);
  }
}

void Dispatcher::Insert(Queued queued) {
  const RoutablePrompt prompt = queued.request->prompt();
  queued.size = std::ssize(prompt.tokens);
  queued.place = prompt.arrived - prompt.priority * kClassIsWorth;
  const auto behind = [&](const Queued& other) {
    return other.place != queued.place ? other.place > queued.place : other.ticket > queued.ticket;
  };
  queue_.insert(std::find_if(queue_.begin(), queue_.end(), behind), std::move(queued));
}

void Dispatcher::RouteAll(absl::Time now) {
  if (queue_.empty()) return;
  const std::shared_ptr<const ClusterView> view = registry_->view();
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  // Nobody who needs as much has found room in this turn: any room, or room that is not promised.
  int64_t too_large = kNone, too_large_to_ask = kNone;
  int full = 0, promised = 0;
  int sent = 0;
  int64_t sent_tokens = 0;
  for (auto it = queue_.begin(); it != queue_.end();) {
    Outcome outcome = Outcome::kWaits;
    const int64_t size = it->size;
    const bool again = !it->retries.empty();
    const bool may_ask = size < too_large_to_ask && promised < kMaxPassing;
    if (size < too_large && full < kMaxPassing && (may_ask || MayBeLocal(*it, *view))) {
      outcome = RouteOne(*it, *view, now);
      // A request that avoids a lost worker may be held up where the next one is not, so it does
      // not hold the others back.
      const int64_t limit = now >= it->since + options_.reserve_after ? 0 : size;
      if (outcome == Outcome::kFull && !it->retries.HasLost()) {
        ++full;
        too_large = limit;
      } else if (outcome == Outcome::kPromised && !it->retries.HasLost()) {
        ++promised;
        too_large_to_ask = std::min(too_large_to_ask, limit);
      } else if (outcome == Outcome::kSent && !again) {
        ++sent;  // what a worker gives back has not moved the queue
        sent_tokens += size;
      }
    } else {
      // Workers are there, and full: it waits for room, not for a worker.
      it->without_worker = absl::InfiniteFuture();
    }
    bool left = outcome == Outcome::kSent || outcome == Outcome::kFailed;
    if (!left) {
      if (const absl::Status overdue = Overdue(*it, now); !overdue.ok()) {
        it->request->Fail(overdue);
        left = true;
      }
    }
    if (left) {
      CountQueued(-1, -it->size);
      it = queue_.erase(it);
    } else {
      ++it;
    }
  }
  wait_.Observe(now, sent, sent_tokens, !queue_.empty());
}

bool Dispatcher::MayBeLocal(Queued& queued, const ClusterView& view) const {
  if (!queued.local.has_value()) {
    const std::vector<int> cached = CachedTokens(queued, view);
    queued.local = false;
    for (size_t w = 0; w < view.workers.size(); ++w) {
      if (queued.size - cached[w] <= view.workers[w].identity->local_prefill_max_tokens) {
        queued.local = true;
      }
    }
  }
  return *queued.local;
}

absl::Status Dispatcher::CheckWait(int priority, absl::Time deadline, absl::Duration wait,
                                   absl::Time now) const {
  const absl::Duration most =
      std::min(options_.max_wait + priority * kClassIsWorth, deadline - now);
  if (wait <= most || wait == absl::ZeroDuration()) return absl::OkStatus();
  return WithRetryAfter(
      ResourceExhausted("overloaded: its turn would come in {}, it may wait {} (--max-wait, or its "
                        "deadline)",
                        absl::FormatDuration(absl::Trunc(wait, absl::Milliseconds(1))),
                        absl::FormatDuration(std::max(absl::Trunc(most, absl::Milliseconds(1)),
                                                      absl::ZeroDuration()))),
      std::clamp(wait - most, kRetryAfter, kLongestRetryAfter));
}

Dispatcher::Outcome Dispatcher::RouteOne(Queued& queued, const ClusterView& view, absl::Time now) {
  if (now < queued.retries.held_until()) {
    queued.without_worker = absl::InfiniteFuture();
    return queued.retries.remote() ? Outcome::kPromised : Outcome::kFull;
  }
  const std::vector<int> cached = CachedTokens(queued, view);
  std::vector<RoutedWork> routed;
  for (const WorkerView& worker : view.workers) {
    routed.push_back(ledger_.Since(worker.identity->id, worker.reported));
  }
  const std::vector<Exclusion> excluded = Excluded(queued, view, now);
  RouteQuery query;
  query.prompt_tokens = static_cast<int>(queued.request->prompt().tokens.size());
  query.cached_tokens = cached;
  query.routed = routed;
  query.excluded = excluded;
  const absl::StatusOr<Route> route = policy_->Choose(view, query);
  if (route.ok()) {
    // What was taken once is not refused later.
    if (queued.retries.empty()) {
      const RoutablePrompt prompt = queued.request->prompt();
      const absl::Status wait =
          CheckWait(prompt.priority, prompt.deadline, absl::Milliseconds(route->wait_ms), now);
      if (!wait.ok()) {
        queued.request->Fail(wait);
        return Outcome::kFailed;
      }
    }
    Send(queued, *route, view.block_size, now);
    return Outcome::kSent;
  }
  if (absl::IsResourceExhausted(route.status())) {
    queued.without_worker = absl::InfiniteFuture();
    return RefusalOf(route.status()).has_value() ? Outcome::kPromised : Outcome::kFull;
  }
  queued.without_worker = std::min(queued.without_worker, now);
  return Outcome::kWaits;
}

std::vector<Exclusion> Dispatcher::Excluded(const Queued& queued, const ClusterView& view,
                                            absl::Time now) const {
  std::vector<Exclusion> excluded;
  for (const WorkerView& worker : view.workers) {
    excluded.push_back(worker.Stalled(now) >= options_.stalled_after
                           ? Exclusion::kLost
                           : queued.retries.ExclusionOf(worker, now));
  }
  for (const WorkerView& decode : view.workers) {
    for (const auto& [id, failures] : decode.load->prefill_failures) {
      const absl::Time last = decode.reported - absl::Seconds(failures.seconds_ago);
      if (now >= last + SuspectFor(failures.in_a_row)) continue;
      for (size_t w = 0; w < excluded.size(); ++w) {
        const WorkerIdentity& worker = *view.workers[w].identity;
        // One that joined later is another process.
        if (excluded[w] == Exclusion::kNone && worker.id == id && worker.joined <= last) {
          excluded[w] = Exclusion::kSuspect;
        }
      }
    }
  }
  return excluded;
}

std::vector<int> Dispatcher::CachedTokens(Queued& queued, const ClusterView& view) const {
  std::vector<int> cached(view.workers.size(), 0);
  if (view.block_size <= 0) return cached;
  // The hashes are kept with the request, for it may be routed many times. They hold as long as the
  // cluster's model and block size do: both change only when all workers have left.
  if (queued.chain_block_size != view.block_size || queued.chain_model != view.model_digest) {
    const RoutablePrompt prompt = queued.request->prompt();
    queued.chain_block_size = view.block_size;
    queued.chain_model = view.model_digest;
    queued.chain = HashTokenBlocks(
        BlockHashSeed(options_.cluster_secret, view.model_digest, std::string(prompt.cache_salt)),
        prompt.tokens, view.block_size);
  }
  std::vector<PrefixIndex::Match> matches = index_->Lookup(queued.chain);
  if (matches.empty()) return cached;
  const auto by_worker = [](const PrefixIndex::Match& a, const PrefixIndex::Match& b) {
    return a.worker < b.worker;
  };
  std::sort(matches.begin(), matches.end(), by_worker);
  for (size_t w = 0; w < cached.size(); ++w) {
    const PrefixIndex::Match wanted{view.workers[w].identity->slot, 0};
    const auto match = std::lower_bound(matches.begin(), matches.end(), wanted, by_worker);
    if (match != matches.end() && match->worker == wanted.worker) {
      cached[w] = match->blocks * view.block_size;
    }
  }
  return cached;
}

void Dispatcher::Send(const Queued& queued, const Route& route, int block_size, absl::Time now) {
  const RoutablePrompt prompt = queued.request->prompt();
  RoutedWork on_decode;
  on_decode.sequences = 1;
  on_decode.blocks = static_cast<int64_t>(prompt.tokens.size()) / std::max(1, block_size) + 1;
  if (route.prefill.empty()) on_decode.prefill_tokens = route.uncached_tokens;
  ledger_.Add(route.decode.id, queued.ticket, now, on_decode);
  if (!route.prefill.empty()) {
    RoutedWork on_prefill;
    on_prefill.sequences = 1;
    on_prefill.prefill_tokens = route.uncached_tokens;
    ledger_.Add(route.prefill.front().id, queued.ticket, now, on_prefill);
  }
  using Metrics = RouterMetrics;
  const auto kind =
      route.prefill.empty() ? Metrics::DecisionKind::kLocal : Metrics::DecisionKind::kPrefill;
  const auto reason = !queued.retries.empty()             ? Metrics::DecisionReason::kRetry
                      : route.predicted_cached_tokens > 0 ? Metrics::DecisionReason::kPrefix
                                                          : Metrics::DecisionReason::kLoad;
  metrics_->decisions(kind, reason).Increment();
  spdlog::debug("request {}: decode on {}, {}", prompt.name, route.decode.id, route.reason);
  queued.request->Start(route);
}

absl::Status Dispatcher::Overdue(const Queued& queued, absl::Time now) const {
  if (now >= queued.without_worker + options_.no_worker_timeout) {
    return Unavailable(
        "no usable set of workers (decode and prefill, or unified) has joined; "
        "waited {} (--no-worker-timeout)",
        absl::FormatDuration(options_.no_worker_timeout));
  }
  if (now >= queued.since + options_.queue_timeout) {
    return WithRetryAfter(
        ResourceExhausted("every decode worker is full; waited {} in the queue (--queue-timeout)",
                          absl::FormatDuration(options_.queue_timeout)),
        kRetryAfter);
  }
  return absl::OkStatus();
}

absl::Time Dispatcher::NextTimeLimit(absl::Time now) const {
  absl::Time next = absl::InfiniteFuture();
  for (const Queued& queued : queue_) {
    next = std::min({next, queued.since + options_.queue_timeout,
                     queued.without_worker + options_.no_worker_timeout,
                     queued.retries.NextChange(now)});
  }
  return next;
}

}  // namespace tandem::router
