#include "decode_worker/remote_prefill.h"

#include <algorithm>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"

namespace tandem::decode {

RemotePrefills::RemotePrefills(kvtransfer::KvReceiver* receiver, PrefillCaller* caller,
                               engine::BlockPool* pool, Clock* clock, absl::Duration call_timeout)
    : receiver_(receiver),
      caller_(caller),
      pool_(pool),
      clock_(clock),
      call_timeout_(call_timeout) {}

absl::Status RemotePrefills::Begin(Sequence* sequence, engine::BlockLease target, int num_shipped) {
  TANDEM_CHECK(sequence->attempt == nullptr, "a second attempt beside a running one");
  const DecodeWork& work = sequence->work;
  auto attempt = std::make_unique<PrefillAttempt>();
  attempt->call_id = ++last_call_id_;
  attempt->transfer = TransferId::Random();
  attempt->epoch = static_cast<uint64_t>(++sequence->times.prefill_attempts);
  attempt->peer = work.prefill[sequence->next_candidate++];

  PrefillCall call;
  const auto blocks = target.blocks().first(static_cast<size_t>(num_shipped));
  call.block_ids.assign(blocks.begin(), blocks.end());
  TANDEM_ASSIGN_OR_RETURN(call.token,
                          receiver_->Expect(attempt->transfer, attempt->epoch, call.block_ids));
  call.call_id = attempt->call_id;
  call.address = attempt->peer.address;
  call.request_id = work.request_id;
  call.tokens.assign(sequence->tokens.begin(), sequence->tokens.begin() + sequence->prompt_length);
  call.sampling = work.sampling;
  call.cache_salt = work.cache_salt;
  call.priority = work.priority;
  call.transfer = attempt->transfer;
  call.epoch = attempt->epoch;
  call.first_block = sequence->lease.size();
  call.deadline = std::min(work.deadline, clock_->Now() + call_timeout_);

  attempt->target = std::move(target);
  transfers_[attempt->transfer] = Transfer{attempt->epoch, sequence, false, 0};
  calls_[attempt->call_id] = sequence;
  sequence->attempt = std::move(attempt);
  sequence->phase = SequencePhase::kAwaitingPrefill;
  caller_->Call(std::move(call));
  return absl::OkStatus();
}

RemotePrefills::Transfer* RemotePrefills::Find(const TransferId& id, uint64_t epoch) {
  auto it = transfers_.find(id);
  return it != transfers_.end() && it->second.epoch == epoch ? &it->second : nullptr;
}

Sequence* RemotePrefills::OnReply(uint64_t call_id, absl::Time now) {
  auto it = calls_.find(call_id);
  if (it == calls_.end()) return nullptr;
  Sequence* sequence = it->second;
  calls_.erase(it);
  sequence->attempt->replied = true;
  sequence->attempt->replied_at = now;
  return sequence;
}

Sequence* RemotePrefills::OnSealed(const TransferId& id, uint64_t epoch,
                                   const kvtransfer::TransferStats& stats, absl::Time now) {
  Transfer* transfer = Find(id, epoch);
  if (transfer == nullptr || transfer->sequence == nullptr) return nullptr;
  PrefillAttempt& attempt = *transfer->sequence->attempt;
  if (attempt.sealed) return nullptr;
  attempt.sealed = true;
  attempt.sealed_at = now;
  attempt.stats = stats;
  return transfer->sequence;
}

Sequence* RemotePrefills::OnFailed(const TransferId& id, uint64_t epoch) {
  Transfer* transfer = Find(id, epoch);
  return transfer == nullptr ? nullptr : transfer->sequence;
}

void RemotePrefills::OnQuiet(const TransferId& id, uint64_t epoch) {
  Transfer* transfer = Find(id, epoch);
  if (transfer == nullptr) return;
  transfer->quiet = true;
  if (transfer->sequence != nullptr) return;
  pool_->ReleaseQuarantine(transfer->ticket);
  transfers_.erase(id);
}

void RemotePrefills::Complete(Sequence* sequence) {
  PrefillAttempt& attempt = *sequence->attempt;
  TANDEM_CHECK(attempt.replied && attempt.sealed, "blocks taken over before they were sealed");
  auto it = transfers_.find(attempt.transfer);
  it->second.sequence = nullptr;
  if (it->second.quiet) transfers_.erase(it);
  sequence->lease.Append(std::move(attempt.target));
  sequence->attempt.reset();
}

void RemotePrefills::Abandon(Sequence* sequence) {
  if (sequence->attempt == nullptr) return;
  PrefillAttempt& attempt = *sequence->attempt;
  if (calls_.erase(attempt.call_id) > 0) caller_->Cancel(attempt.call_id);
  receiver_->Cancel(attempt.transfer, attempt.epoch);
  auto it = transfers_.find(attempt.transfer);
  it->second.sequence = nullptr;
  if (it->second.quiet) {
    transfers_.erase(it);
  } else {
    it->second.ticket = pool_->Quarantine(std::move(attempt.target));
  }
  sequence->attempt.reset();
}

}  // namespace tandem::decode
