#include "router/stream/dispatcher.h"

#include <algorithm>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

// How long a request avoids a worker that failed it but is still in the cluster.
constexpr absl::Duration kAvoidLost = absl::Milliseconds(250);
// How long it avoids one that was full and does not report.
constexpr absl::Duration kAvoidFull = absl::Seconds(1);
constexpr absl::Duration kRetryAfter = absl::Seconds(1);

}  // namespace

Dispatcher::Dispatcher(DispatcherOptions options, Registry* registry, const PrefixIndex* index,
                       const RoutingPolicy* policy, RouterMetrics* metrics, Clock* clock)
    : options_(std::move(options)),
      registry_(registry),
      index_(index),
      policy_(policy),
      metrics_(metrics),
      clock_(clock),
      thread_([this] { Run(); }) {}

Dispatcher::~Dispatcher() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

absl::Status Dispatcher::Submit(std::shared_ptr<Dispatchable> request, Ticket* ticket) {
  const absl::Time now = clock_->Now();
  absl::MutexLock lock(&mutex_);
  if (queued_ >= options_.max_queued_requests) {
    return WithRetryAfter(
        ResourceExhausted("the queue is full: {} requests wait (--max-queued-requests)", queued_),
        kRetryAfter);
  }
  *ticket = next_ticket_++;
  CountQueued(+1);
  Note& note = notes_.emplace_back();
  note.queued.request = std::move(request);
  note.queued.ticket = *ticket;
  note.queued.since = now;
  return absl::OkStatus();
}

void Dispatcher::Requeue(std::shared_ptr<Dispatchable> request, Ticket ticket, absl::Time since,
                         std::vector<Refusal> refusals) {
  Note note;
  note.queued.request = std::move(request);
  note.queued.ticket = ticket;
  note.queued.since = since;
  note.queued.refusals = std::move(refusals);
  absl::MutexLock lock(&mutex_);
  CountQueued(+1);
  notes_.push_back(std::move(note));
}

void Dispatcher::Ended(Ticket ticket) {
  Note note;
  note.queued.ticket = ticket;
  note.ended = true;
  absl::MutexLock lock(&mutex_);
  notes_.push_back(std::move(note));
}

void Dispatcher::Kick() {
  absl::MutexLock lock(&mutex_);
  kicked_ = true;
}

int Dispatcher::queued() const {
  absl::MutexLock lock(&mutex_);
  return queued_;
}

void Dispatcher::CountQueued(int delta) {
  queued_ += delta;
  metrics_->waiting.Set(queued_);
}

void Dispatcher::Run() {
  while (true) {
    std::vector<Note> notes;
    {
      const absl::Duration limit = NextTimeLimit() - clock_->Now();
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(this, &Dispatcher::HasNotes), limit);
      if (stopping_) break;
      notes.swap(notes_);
      kicked_ = false;
    }
    TakeNotes(std::move(notes));
    RouteAll(clock_->Now());
  }
  std::vector<Note> notes;
  {
    absl::MutexLock lock(&mutex_);
    notes.swap(notes_);
  }
  TakeNotes(std::move(notes));
  for (const Queued& queued : queue_) {
    queued.request->Fail(Unavailable("the router is shutting down"));
  }
}

void Dispatcher::TakeNotes(std::vector<Note> notes) {
  for (Note& note : notes) {
    if (!note.ended) {
      ledger_.Remove(note.queued.ticket);
      Insert(std::move(note.queued));
      continue;
    }
    ledger_.End(note.queued.ticket, clock_->Now());
    const size_t removed = std::erase_if(
        queue_, [&](const Queued& queued) { return queued.ticket == note.queued.ticket; });
    if (removed > 0) {
      absl::MutexLock lock(&mutex_);
      CountQueued(-static_cast<int>(removed));
    }
  }
}

void Dispatcher::Insert(Queued queued) {
  const auto behind = [&](const Queued& other) {
    const int a = other.request->request().priority, b = queued.request->request().priority;
    return a != b ? a < b : other.ticket > queued.ticket;
  };
  queue_.insert(std::find_if(queue_.begin(), queue_.end(), behind), std::move(queued));
}

void Dispatcher::RouteAll(absl::Time now) {
  if (queue_.empty()) return;
  const std::shared_ptr<const ClusterView> view = registry_->view();
  bool blocked = false;
  int left = 0;
  for (auto it = queue_.begin(); it != queue_.end();) {
    Outcome outcome = Outcome::kWaits;
    if (!blocked) {
      outcome = Route(*it, *view, now);
      // One that avoids a lost worker may be held up where the next one is not.
      const bool avoids_lost =
          std::any_of(it->refusals.begin(), it->refusals.end(),
                      [](const Refusal& refusal) { return refusal.kind == Refusal::Kind::kLost; });
      blocked = outcome == Outcome::kFull && !avoids_lost;
    } else {
      // Workers are there, and full: it waits for room.
      it->without_worker = absl::InfiniteFuture();
    }
    if (outcome != Outcome::kLeft) {
      if (const absl::Status overdue = Overdue(*it, now); !overdue.ok()) {
        it->request->Fail(overdue);
        outcome = Outcome::kLeft;
      }
    }
    if (outcome == Outcome::kLeft) {
      it = queue_.erase(it);
      ++left;
    } else {
      ++it;
    }
  }
  absl::MutexLock lock(&mutex_);
  CountQueued(-left);
}

Dispatcher::Outcome Dispatcher::Route(Queued& queued, const ClusterView& view, absl::Time now) {
  const std::vector<int> cached = CachedTokens(queued, view);
  std::vector<AssignedWork> assigned;
  std::vector<Exclusion> excluded;
  for (const WorkerView& worker : view.workers) {
    assigned.push_back(ledger_.Since(worker.identity->id, worker.reported));
    excluded.push_back(ExclusionOf(queued, worker, now));
  }
  RouteQuery query;
  query.prompt_tokens = static_cast<int>(queued.request->request().tokens.size());
  query.cached_tokens = cached;
  query.assigned = assigned;
  query.excluded = excluded;
  const absl::StatusOr<RouteChoice> choice = policy_->Choose(view, query);
  if (choice.ok()) {
    Assign(queued, view, *choice, now);
    return Outcome::kLeft;
  }
  if (absl::IsResourceExhausted(choice.status())) {
    queued.without_worker = absl::InfiniteFuture();
    return Outcome::kFull;
  }
  queued.without_worker = std::min(queued.without_worker, now);
  return Outcome::kWaits;
}

std::vector<int> Dispatcher::CachedTokens(Queued& queued, const ClusterView& view) const {
  std::vector<int> cached(view.workers.size(), 0);
  if (view.block_size <= 0) return cached;
  const Request& request = queued.request->request();
  if (queued.chain_block_size != view.block_size || queued.chain_model != view.model_digest) {
    queued.chain_block_size = view.block_size;
    queued.chain_model = view.model_digest;
    queued.chain = HashTokenBlocks(
        BlockHashSeed(options_.cluster_secret, view.model_digest, request.cache_salt),
        request.tokens, view.block_size);
  }
  const std::vector<PrefixIndex::Match> matches = index_->Lookup(queued.chain);
  for (size_t w = 0; w < cached.size(); ++w) {
    for (const PrefixIndex::Match& match : matches) {
      if (match.worker == view.workers[w].identity->slot) {
        cached[w] = match.blocks * view.block_size;
      }
    }
  }
  return cached;
}

Exclusion Dispatcher::ExclusionOf(const Queued& queued, const WorkerView& worker,
                                  absl::Time now) const {
  for (const Refusal& refusal : queued.refusals) {
    if (refusal.worker != worker.identity->id ||
        refusal.incarnation != worker.identity->incarnation) {
      continue;
    }
    if (refusal.kind == Refusal::Kind::kLost) {
      if (now < refusal.at + kAvoidLost) return Exclusion::kLost;
    } else if (worker.reported <= refusal.reported && now < refusal.at + kAvoidFull) {
      return Exclusion::kFull;
    }
  }
  return Exclusion::kNone;
}

void Dispatcher::Assign(const Queued& queued, const ClusterView& view, const RouteChoice& choice,
                        absl::Time now) {
  const Request& request = queued.request->request();
  const WorkerView& decode = view.workers[static_cast<size_t>(choice.decode)];
  Assignment assignment;
  assignment.decode_worker = decode.identity->id;
  assignment.incarnation = decode.identity->incarnation;
  assignment.decode_address = decode.identity->address;
  assignment.reason = choice.reason;
  assignment.predicted_cached_tokens = choice.predicted_cached_tokens;
  assignment.reported = decode.reported;
  for (const int p : choice.prefill) {
    const WorkerIdentity& prefill = *view.workers[static_cast<size_t>(p)].identity;
    assignment.prefill.push_back({prefill.id, prefill.address});
  }
  AssignedWork on_decode;
  on_decode.sequences = 1;
  on_decode.blocks = static_cast<int64_t>(request.tokens.size()) / view.block_size + 1;
  if (assignment.prefill.empty()) on_decode.prefill_tokens = choice.uncached_tokens;
  ledger_.Add(assignment.decode_worker, queued.ticket, now, on_decode);
  if (!assignment.prefill.empty()) {
    AssignedWork on_prefill;
    on_prefill.prefill_tokens = choice.uncached_tokens;
    ledger_.Add(assignment.prefill.front().worker_id, queued.ticket, now, on_prefill);
  }
  using Metrics = RouterMetrics;
  const auto kind =
      assignment.prefill.empty() ? Metrics::DecisionKind::kLocal : Metrics::DecisionKind::kPrefill;
  const auto reason = !queued.refusals.empty()             ? Metrics::DecisionReason::kRetry
                      : choice.predicted_cached_tokens > 0 ? Metrics::DecisionReason::kPrefix
                                                           : Metrics::DecisionReason::kLoad;
  metrics_->decisions(kind, reason).Increment();
  spdlog::debug("request {}: decode on {}, {}", request.id, assignment.decode_worker,
                assignment.reason);
  queued.request->Start(assignment);
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

absl::Time Dispatcher::NextTimeLimit() const {
  absl::Time next = absl::InfiniteFuture();
  for (const Queued& queued : queue_) {
    next = std::min({next, queued.since + options_.queue_timeout,
                     queued.without_worker + options_.no_worker_timeout});
    for (const Refusal& refusal : queued.refusals) {
      const absl::Time again =
          refusal.at + (refusal.kind == Refusal::Kind::kLost ? kAvoidLost : kAvoidFull);
      if (again > clock_->Now()) next = std::min(next, again);
    }
  }
  return next;
}

}  // namespace tandem::router
