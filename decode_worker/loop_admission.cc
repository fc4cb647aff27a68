// How work comes into the loop, and how prompts become runnable.
#include <algorithm>
#include <string>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/status.h"
#include "decode_worker/loop.h"

namespace tandem::decode {

void DecodeLoop::Handle(WorkArrived event) {
  const absl::Status status = Admit(&event);
  changed_ = true;
  if (status.ok()) return;
  parts_.metrics->worker.requests_failed.Increment();
  event.stream->End(status);
}

absl::Status DecodeLoop::Validate(const DecodeWork& work) const {
  if (draining_) return Unavailable("worker {} is draining", options_.worker_id);
  if (work.tokens.empty()) return InvalidArgument("token_ids must not be empty");
  if (static_cast<int>(work.tokens.size()) >= options_.max_model_len) {
    return InvalidArgument(
        "token_ids has {} tokens; max_model_len {} leaves room for a prompt of at most {}",
        work.tokens.size(), options_.max_model_len, options_.max_model_len - 1);
  }
  if (work.sampling.max_tokens < 1) {
    return InvalidArgument("sampling.max_tokens must be at least 1, got {}",
                           work.sampling.max_tokens);
  }
  if (parts_.clock->Now() >= work.deadline) {
    return DeadlineExceeded("deadline passed before the request was admitted");
  }
  return absl::OkStatus();
}

// Reserves before any compute is spent; `event` keeps its stream unless OK is returned.
absl::Status DecodeLoop::Admit(WorkArrived* event) {
  TANDEM_RETURN_IF_ERROR(Validate(event->work));
  const DecodeWork& work = event->work;
  const int block_size = options_.limits.block_size;
  const int length = static_cast<int>(work.tokens.size());
  const bool may_ask = !options_.unified && !work.prefill.empty();
  const Hash128 seed =
      BlockHashSeed(options_.cluster_secret, options_.model_digest, work.cache_salt);
  // The last token is always computed, for its output is the first draw. Prompt logprobs need all
  // positions computed; a prefill worker sees to that itself.
  const bool match = may_ask || work.sampling.prompt_logprobs < 0;
  engine::BlockLease held =
      parts_.cache->Match(seed, work.tokens, match ? (length - 1) / block_size : 0);
  const int needed = BlocksFor(length + 1, block_size) - held.size();
  const int total = parts_.pool->counts().total;
  switch (CanAdmit(View(), needed, total, options_.limits)) {
    case Admission::kTooManySequences:
      return ResourceExhausted("worker {} already runs max_num_seqs = {} sequences",
                               options_.worker_id, options_.limits.max_num_seqs);
    case Admission::kNoBlocks:
      return ResourceExhausted("worker {} has no {} KV blocks free ({} of {} available)",
                               options_.worker_id, needed, parts_.pool->NumAvailable(), total);
    case Admission::kYes:
      break;
  }
  TANDEM_ASSIGN_OR_RETURN(engine::BlockLease fresh, parts_.pool->Reserve(needed));

  auto sequence = std::make_unique<Sequence>();
  Sequence* s = sequence.get();
  s->tokens = std::move(event->work.tokens);
  s->work = std::move(event->work);
  s->prompt_length = length;
  s->hash_seed = seed;
  s->cached_blocks = held.size();
  s->cached_tokens = held.size() * block_size;
  s->lease = std::move(held);
  s->reserved_at = parts_.clock->Now();
  s->times.decode_queue = absl::ToDoubleMilliseconds(s->reserved_at - s->work.arrived);

  const int uncached = length - s->cached_tokens;
  if (may_ask && (uncached > options_.local_prefill_max_tokens)) {
    TANDEM_RETURN_IF_ERROR(StartPrefill(s, std::move(fresh)));
  } else {
    if (may_ask && s->work.sampling.prompt_logprobs >= 0) {
      // Matched above, but computed here after all: cached blocks may not be written, so the
      // logprobs need blocks of their own.
      fresh.Release();
      s->lease.Release();
      TANDEM_ASSIGN_OR_RETURN(fresh, parts_.pool->Reserve(BlocksFor(length + 1, block_size)));
      s->cached_blocks = 0;
      s->cached_tokens = 0;
    }
    s->lease.Append(std::move(fresh));
    s->computed = s->cached_tokens;
    s->times.transport = "local";
    s->times.prefill_worker = options_.worker_id;
  }
  s->stream = std::move(event->stream);
  const auto place = std::upper_bound(
      sequences_.begin(), sequences_.end(), s->work.priority,
      [](int priority, const auto& other) { return priority > other->work.priority; });
  sequences_.insert(place, std::move(sequence));
  return absl::OkStatus();
}

// `fresh`: the prompt's blocks that the sequence does not hold, and room to grow.
absl::Status DecodeLoop::StartPrefill(Sequence* s, engine::BlockLease fresh) {
  const int prompt_blocks = BlocksFor(s->prompt_length, options_.limits.block_size);
  return prefills_.Begin(s, std::move(fresh), prompt_blocks - s->lease.size());
}

void DecodeLoop::Handle(WorkCancelled event) {
  for (auto& s : sequences_) {
    if (s->work.id != event.id || s->closed) continue;
    Close(s.get(), Cancelled("cancelled after {} generated tokens", s->generated()));
  }
}

void DecodeLoop::Handle(PrefillReply event) {
  const absl::Time now = parts_.clock->Now();
  Sequence* s = prefills_.OnReply(event.call_id, now);
  if (s == nullptr) return;
  if (!event.result.ok()) return RetryPrefill(s, event.result.status());
  PrefillResult& result = *event.result;
  s->cached_tokens = result.cached_tokens;
  s->prompt_logprobs = std::move(result.prompt_logprobs);
  s->times.prefill_queue = result.queue_ms;
  s->times.prefill = result.prefill_ms;
  s->times.kv_bytes = result.kv_bytes;
  s->times.prefill_worker = std::move(result.worker_id);
  s->times.transport = options_.kv_transport;
  Emit(s, std::move(result.first_token), now);  // before its KV is here: it need not wait
  if (!s->closed && s->attempt->sealed) MakeRunnable(s);
}

void DecodeLoop::Handle(KvSealed event) {
  Sequence* s = prefills_.OnSealed(event.id, event.epoch, event.stats, parts_.clock->Now());
  if (s != nullptr && s->attempt->replied) MakeRunnable(s);
}

void DecodeLoop::Handle(KvFailed event) {
  Sequence* s = prefills_.OnFailed(event.id, event.epoch);
  if (s == nullptr) return;
  CountKvFailure(*s);
  if (s->attempt->replied) {
    LoseKv(s, event.status);
  } else {
    RetryPrefill(s, event.status);
  }
}

void DecodeLoop::Handle(KvQuiet event) {
  prefills_.OnQuiet(event.id, event.epoch);
  changed_ = true;
}

void DecodeLoop::Handle(SnapshotWanted) {
  if (!hooks_.blocks) return;
  hooks_.blocks(engine::BlockEvents{parts_.cache->Snapshot(), {}}, /*cleared=*/true);
  changed_ = true;
}

void DecodeLoop::Handle(DrainWanted) { draining_ = true; }

void DecodeLoop::Handle(StopWanted) { stop_ = true; }

// No token is out yet: the next candidate gets the prompt, into other blocks.
void DecodeLoop::RetryPrefill(Sequence* s, const absl::Status& why) {
  const PrefillPeer peer = s->attempt->peer;
  spdlog::warn("{}: prefill at {} failed: {}", s->work.request_id, peer.worker_id, why.ToString());
  const int num_blocks = s->attempt->target.size();
  prefills_.Abandon(s);
  if (absl::IsInvalidArgument(why)) return Close(s, why);
  if (s->next_candidate >= s->work.prefill.size()) {
    const std::string message = fmt::format("no prefill worker left after {}: {}", peer.worker_id,
                                            std::string(why.message()));
    return Close(s, absl::IsResourceExhausted(why) ? absl::ResourceExhaustedError(message)
                                                   : absl::UnavailableError(message));
  }
  parts_.metrics->prefill_retries.Increment();
  absl::StatusOr<engine::BlockLease> fresh = parts_.pool->Reserve(num_blocks);
  if (!fresh.ok()) {
    return Close(s, Unavailable("prefill at {} failed and no {} KV blocks are free for another try",
                                peer.worker_id, num_blocks));
  }
  absl::Status status = StartPrefill(s, *std::move(fresh));
  if (!status.ok()) Close(s, status);
}

void DecodeLoop::CountKvFailure(const Sequence& s) {
  parts_.metrics->worker
      .KvLink(s.attempt->peer.worker_id, options_.worker_id, options_.kv_transport)
      .failures.Increment();
}

// The first token is out but its KV never came: computed here, as after a preemption.
void DecodeLoop::LoseKv(Sequence* s, const absl::Status& why) {
  spdlog::warn("{}: KV from {} was lost, computing it here: {}", s->work.request_id,
               s->attempt->peer.worker_id, why.ToString());
  parts_.metrics->kv_recomputes.Increment();
  prefills_.Abandon(s);
  s->times.transport = "local";
  s->times.kv_bytes = 0;
  s->lease.Release();
  s->cached_blocks = 0;
  s->phase = SequencePhase::kPreempted;
  s->runnable_at = parts_.clock->Now();
  changed_ = true;
}

void DecodeLoop::MakeRunnable(Sequence* s) {
  const PrefillAttempt& attempt = *s->attempt;
  const kvtransfer::TransferStats& stats = attempt.stats;
  const absl::Duration took = std::max(stats.last_byte - stats.first_byte, absl::ZeroDuration());
  // Sealed is when this loop saw it, which may be a step later than the last byte.
  const absl::Duration exposed =
      std::max(attempt.sealed_at - attempt.replied_at, absl::ZeroDuration());
  s->times.kv_transfer_total = absl::ToDoubleMilliseconds(std::max(took, exposed));
  s->times.kv_transfer_exposed = absl::ToDoubleMilliseconds(exposed);
  s->times.kv_bytes = stats.bytes;
  s->times.transport = stats.transport;
  KvLinkMetrics& link =
      parts_.metrics->worker.KvLink(attempt.peer.worker_id, options_.worker_id, stats.transport);
  link.seconds.Observe(absl::ToDoubleSeconds(took));
  link.bytes.Increment(static_cast<double>(stats.bytes));
  prefills_.Complete(s);
  s->phase = SequencePhase::kRunnable;
  s->computed = s->prompt_length;
  s->runnable_at = parts_.clock->Now();
  CacheComputed(s);
  changed_ = true;
}

}  // namespace tandem::decode
