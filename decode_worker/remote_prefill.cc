#include "decode_worker/remote_prefill.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/kv_layout.h"
#include "common/base/refusal.h"
#include "common/base/status.h"
#include "worker/kv_span.h"

namespace tandem::decode {
namespace {

// Workers come and go under new names.
constexpr size_t kMaxFailed = 1024;

}  // namespace

RemotePrefills::RemotePrefills(RemotePrefillOptions options, kvtransfer::KvReceiver* receiver,
                               kvtransfer::KvSender* sender, PrefillCaller* caller,
                               engine::BlockPool* pool, engine::PrefixCache* cache, Clock* clock,
                               DecodeMetrics* metrics)
    : options_(std::move(options)),
      receiver_(receiver),
      caller_(caller),
      pool_(pool),
      clock_(clock),
      metrics_(metrics),
      window_(options_.window),
      returns_(options_.worker_id, options_.num_layers, sender, cache, &metrics->worker) {}

absl::Status RemotePrefills::Begin(Sequence* s, engine::BlockLease target, absl::Time now) {
  TANDEM_CHECK(s->attempt == nullptr, "a second attempt beside a running one");
  auto attempt = std::make_unique<PrefillAttempt>();
  attempt->call_id = ++last_call_id_;
  attempt->transfer = TransferId::Random();
  attempt->epoch = static_cast<uint64_t>(++s->timing.prefill_attempts);
  attempt->peer = s->work.prefill[s->next_candidate++];
  attempt->target = std::move(target);
  attempt->began_at = now;
  attempt->trace = s->trace != nullptr ? s->trace->NewCall() : s->work.trace;
  attempt->first_token =
      std::make_shared<FirstToken>(s->stream, s->work.sampling, s->prompt_length, s->arrived_length,
                                   s->max_length, s->timing, now);
  PrefillCall call = MakeCall(*s, *attempt);
  TANDEM_ASSIGN_OR_RETURN(call.token, receiver_->Expect(attempt->transfer, attempt->epoch,
                                                        call.block_ids, attempt->peer.worker_id));
  transfers_[attempt->transfer] = Transfer{attempt->epoch, s, false, 0};
  calls_[attempt->call_id] = s;
  attempt->asked_tokens = s->arrived_length - s->lease.size() * options_.block_size;
  window_.Add(attempt->peer.worker_id, attempt->asked_tokens, attempt->target.size());
  s->attempt = std::move(attempt);
  s->phase = SequencePhase::kAwaitingPrefill;
  caller_->Call(std::move(call));
  return absl::OkStatus();
}

PrefillCall RemotePrefills::MakeCall(const Sequence& s, const PrefillAttempt& attempt) const {
  const int prompt_blocks = BlocksFor(s.arrived_length, options_.block_size);
  // A sequence that needs no KV has no blocks for it.
  const int first_block = attempt.target.empty() ? prompt_blocks : s.lease.size();
  const auto shipped =
      attempt.target.blocks().first(static_cast<size_t>(prompt_blocks - first_block));
  PrefillCall call;
  call.call_id = attempt.call_id;
  call.peer = attempt.peer;
  call.request_id = s.work.request_id;
  call.tokens.assign(s.tokens.begin(), s.tokens.begin() + s.arrived_length);
  call.prompt_length = s.prompt_length;
  call.sampling = s.work.sampling;
  call.cache_salt = s.work.cache_salt;
  call.priority = s.work.priority;
  call.progress = s.work.progress;
  call.transfer = attempt.transfer;
  call.epoch = attempt.epoch;
  call.first_block = first_block;
  call.block_ids.assign(shipped.begin(), shipped.end());
  call.gives_back =
      returns_.possible() && !attempt.peer.return_address.empty() && first_block == s.lease.size();
  call.first_token = attempt.first_token;
  call.trace = attempt.trace;
  call.deadline = std::min(s.work.deadline, clock_->Now() + options_.call_timeout);
  return call;
}

RemotePrefills::Transfer* RemotePrefills::Find(const TransferId& id, uint64_t epoch) {
  auto it = transfers_.find(id);
  return it != transfers_.end() && it->second.epoch == epoch ? &it->second : nullptr;
}

Sequence* RemotePrefills::EndCall(uint64_t call_id, absl::Time now, absl::StatusCode code) {
  const auto it = calls_.find(call_id);
  if (it == calls_.end()) return nullptr;
  Sequence* s = it->second;
  calls_.erase(it);
  returns_.Abort(call_id);
  const PrefillAttempt& attempt = *s->attempt;
  window_.Remove(attempt.peer.worker_id, attempt.asked_tokens, attempt.target.size());
  if (s->trace != nullptr) {
    s->trace->AddCall(attempt.trace, "prefill_call", attempt.began_at, now,
                      {{"prefill_worker", attempt.peer.worker_id}}, code);
  }
  return s;
}

Sequence* RemotePrefills::OnReply(const PrefillReply& reply) {
  const absl::Time at = std::min(reply.at, clock_->Now());
  Sequence* s = EndCall(reply.call_id, at, reply.outcome.status().code());
  if (s == nullptr) return nullptr;
  s->attempt->replied = true;
  s->attempt->replied_at = at;
  return s;
}

Sequence* RemotePrefills::OnSealed(const TransferId& id, uint64_t epoch,
                                   const kvtransfer::TransferStats& stats) {
  Transfer* transfer = Find(id, epoch);
  if (transfer == nullptr || transfer->sequence == nullptr) return nullptr;
  PrefillAttempt& attempt = *transfer->sequence->attempt;
  if (attempt.sealed) return nullptr;
  attempt.sealed = true;
  attempt.sealed_at = clock_->Now();
  attempt.stats = stats;
  return transfer->sequence;
}

Sequence* RemotePrefills::OnFailed(const TransferId& id, uint64_t epoch,
                                   const absl::Status& status) {
  Transfer* transfer = Find(id, epoch);
  if (transfer == nullptr || transfer->sequence == nullptr) return nullptr;
  CountFailure(*transfer->sequence);
  PrefillAttempt& attempt = *transfer->sequence->attempt;
  if (!attempt.replied && attempt.first_token->Close()) {
    attempt.kv_failure = status;
    return nullptr;
  }
  return transfer->sequence;
}

void RemotePrefills::OnQuiet(const TransferId& id, uint64_t epoch) {
  Transfer* transfer = Find(id, epoch);
  if (transfer == nullptr) return;
  transfer->quiet = true;
  // Kept until the attempt is over, which then need not quarantine its blocks.
  if (transfer->sequence != nullptr) return;
  pool_->ReleaseQuarantine(transfer->ticket);
  transfers_.erase(id);
}

void RemotePrefills::OnWanted(BlocksWanted wanted) {
  const auto it = calls_.find(wanted.call_id);
  if (it != calls_.end()) returns_.Give(*it->second, std::move(wanted));
}

void RemotePrefills::OnGiven(const KvGiven& given) {
  returns_.OnGiven(given.id, given.epoch, given.status, given.stats);
}

bool RemotePrefills::SealIsLate(Sequence* s) {
  if (s->attempt == nullptr || !s->attempt->replied || s->attempt->sealed) return false;
  PrefillAttempt& attempt = *s->attempt;
  const absl::Time now = clock_->Now();
  if (now - std::max(attempt.replied_at, attempt.progressed_at) < options_.kv_seal_timeout) {
    return false;
  }
  const uint64_t bytes = receiver_->BytesArrived(attempt.transfer, attempt.epoch);
  if (bytes == attempt.bytes_seen) return true;
  attempt.bytes_seen = bytes;
  attempt.progressed_at = now;
  return false;
}

void RemotePrefills::TakeOutcome(Sequence* s, PrefillOutcome outcome) {
  failed_.erase(s->attempt->peer.worker_id);
  s->cached_tokens = outcome.cached_tokens;
  s->prompt_logprobs = std::move(outcome.prompt_logprobs);
  AddOutcome(outcome, s->attempt->replied_at - s->attempt->began_at, &s->timing);
}

void RemotePrefills::Complete(Sequence* s) {
  PrefillAttempt& attempt = *s->attempt;
  TANDEM_CHECK(attempt.replied && attempt.sealed, "blocks taken over before they were sealed");
  const kvtransfer::TransferStats& stats = attempt.stats;
  const absl::Duration took = std::max(stats.last_byte - stats.first_byte, absl::ZeroDuration());
  // Sealed is when this loop saw it, which may be a step later than the last byte.
  const absl::Duration exposed =
      std::max(attempt.sealed_at - attempt.replied_at, absl::ZeroDuration());
  s->timing.stages[Stage::kKvTransferTotal] = absl::ToDoubleMilliseconds(std::max(took, exposed));
  s->timing.stages[Stage::kKvTransferExposed] = absl::ToDoubleMilliseconds(exposed);
  s->timing.kv_bytes = stats.bytes;
  s->timing.transport = stats.transport;
  KvLinkMetrics& link =
      metrics_->worker.KvLink(attempt.peer.worker_id, options_.worker_id, stats.transport);
  link.seconds.Observe(absl::ToDoubleSeconds(took));
  link.bytes.Increment(static_cast<double>(stats.bytes));
  worker::AddKvTransfer(stats, attempt.peer.worker_id, options_.worker_id, s->trace.get());

  auto it = transfers_.find(attempt.transfer);
  it->second.sequence = nullptr;
  if (it->second.quiet) transfers_.erase(it);
  s->lease.Append(std::move(attempt.target));
  s->attempt.reset();
  s->phase = SequencePhase::kRunnable;
  s->computed = s->launched = s->proven = s->arrived_length;
  s->runnable_at = clock_->Now();
}

absl::Status RemotePrefills::Retry(Sequence* s, const absl::Status& why, bool reached) {
  const PrefillPeer peer = s->attempt->peer;
  spdlog::warn("{}: prefill at {} failed: {}", s->work.request_id, peer.worker_id, why.ToString());
  NoteFailure(peer.worker_id, why);
  const int num_blocks = s->attempt->target.size();
  const absl::Time began_at = s->attempt->began_at;
  Abandon(s, why.code());
  const absl::Time now = clock_->Now();
  s->timing.stages[Stage::kFailedAttempts] += absl::ToDoubleMilliseconds(now - began_at);
  if (absl::IsInvalidArgument(why)) return why;  // no other worker would take it either
  // A step that fails takes its neighbours along, so one more worker may be asked; one that dies
  // likewise, and not a third. One that was gone before knows nothing of the prompt.
  const uint32_t asked = 1u << (s->next_candidate - 1);
  if (reached && (absl::IsUnavailable(why) || absl::IsInternal(why))) s->lost_prefills |= asked;
  const int lost = std::popcount(s->lost_prefills);
  const bool enough = lost >= s->work.may_lose;
  if (enough || s->next_candidate >= s->work.prefill.size()) {
    const std::string message =
        enough ? fmt::format("{} prefill workers were lost with this prompt, the last one {}: {}",
                             lost, peer.worker_id, MessageOf(why))
               : fmt::format("no prefill worker left after {}: {}", peer.worker_id, MessageOf(why));
    if (absl::IsInternal(why)) return why;
    const bool full = absl::IsResourceExhausted(why);
    // One that was not reached comes back or leaves the cluster: the router asks again, and holds
    // it against nobody. Whatever else it was may come again with the prompt.
    const bool blameless = full || (!reached && absl::IsUnavailable(why));
    if (!blameless) s->lost_prefills |= asked;
    return WithRefusal(
        full ? absl::ResourceExhaustedError(message) : absl::UnavailableError(message),
        {.reason = Refusal::Reason::kPrefill, .lost = s->lost_prefills});
  }
  metrics_->prefill_retries.Increment();
  // Other blocks: the old ones may be written until their sender is quiet.
  absl::StatusOr<engine::BlockLease> fresh = pool_->Reserve(num_blocks);
  if (!fresh.ok()) {
    return WithRefusal(
        Unavailable("prefill at {} failed and no {} KV blocks are free for another try",
                    peer.worker_id, num_blocks),
        {Refusal::Reason::kBlocks, num_blocks, pool_->NumAvailable()});
  }
  return Begin(s, *std::move(fresh), now);
}

void RemotePrefills::Lose(Sequence* s, const absl::Status& why) {
  spdlog::warn("{}: KV from {} was lost, computing it here: {}", s->work.request_id,
               s->attempt->peer.worker_id, why.ToString());
  metrics_->kv_recomputes.Increment();
  const absl::Time now = clock_->Now();
  s->timing.stages[Stage::kKvTransferExposed] =
      absl::ToDoubleMilliseconds(now - s->attempt->replied_at);
  if (s->trace != nullptr) {
    s->trace->Add("kv_transfer", s->attempt->replied_at, now,
                  {{"source", s->attempt->peer.worker_id}, {"destination", options_.worker_id}},
                  why.code());
  }
  Abandon(s, why.code());
  s->timing.transport = "local";
  s->timing.kv_bytes = 0;
  s->lease.Release();
  s->computed = s->launched = s->proven = 0;
  s->cached_blocks = 0;
  s->phase = SequencePhase::kPreempted;
  s->runnable_at = now;
}

void RemotePrefills::Abandon(Sequence* s, absl::StatusCode why) {
  if (s->attempt == nullptr) return;
  PrefillAttempt& attempt = *s->attempt;
  attempt.first_token->Close();
  if (EndCall(attempt.call_id, clock_->Now(), why) != nullptr) caller_->Cancel(attempt.call_id);
  receiver_->Cancel(attempt.transfer, attempt.epoch);
  auto it = transfers_.find(attempt.transfer);
  it->second.sequence = nullptr;
  if (it->second.quiet) {
    transfers_.erase(it);
  } else {
    it->second.ticket = pool_->Quarantine(std::move(attempt.target));
  }
  s->attempt.reset();
}

void RemotePrefills::NoteFailure(const std::string& worker_id, const absl::Status& why) {
  // What is said of the prompt, of the queue or of the caller says nothing of the worker.
  if (absl::IsInvalidArgument(why) || absl::IsInternal(why) || absl::IsResourceExhausted(why) ||
      absl::IsCancelled(why)) {
    return;
  }
  if (failed_.size() >= kMaxFailed && !failed_.contains(worker_id)) failed_.clear();
  Failed& failed = failed_[worker_id];
  ++failed.in_a_row;
  failed.last = clock_->Now();
}

std::map<std::string, LoadReport::PrefillFailures> RemotePrefills::Failures() const {
  std::map<std::string, LoadReport::PrefillFailures> out;
  for (const auto& [worker_id, failed] : failed_) {
    out[worker_id] = {failed.in_a_row, absl::ToDoubleSeconds(clock_->Now() - failed.last)};
  }
  return out;
}

void RemotePrefills::CountFailure(const Sequence& s) {
  metrics_->worker.KvLink(s.attempt->peer.worker_id, options_.worker_id, options_.kv_transport)
      .failures.Increment();
}

}  // namespace tandem::decode
