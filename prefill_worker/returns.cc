#include "prefill_worker/returns.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "worker/kv_span.h"

namespace tandem::prefill {
namespace {

// A worker that did not give what it was asked for is not asked again for so long, then twice as
// long, ...: every prompt would wait for it in vain.
constexpr absl::Duration kFirstDistrust = absl::Seconds(30), kLongestDistrust = absl::Minutes(10);
// Workers come and go under new names.
constexpr size_t kMaxDistrusted = 1024;
// Of the pool, that may wait for senders before nothing more is asked for.
constexpr double kMaxQuarantined = 0.5;

}  // namespace

Returns::Returns(ReturnOptions options, kvtransfer::KvReceiver* receiver, engine::BlockPool* pool,
                 Clock* clock, PrefillMetrics* metrics)
    : options_(std::move(options)),
      receiver_(receiver),
      pool_(pool),
      clock_(clock),
      metrics_(metrics) {}

bool Returns::Trusts(const std::string& peer) const {
  const auto it = distrusted_.find(peer);
  return it == distrusted_.end() || clock_->Now() >= it->second.until;
}

bool Returns::Begin(Sequence* s, int cached) {
  if (receiver_ == nullptr || s->work.want == nullptr || s->return_tried) return false;
  const int end = std::min(s->work.first_block, s->MaxCachedBlocks(options_.block_size));
  const std::string& peer = s->work.target.peer_worker_id;
  if (end <= cached || !Trusts(peer)) return false;
  const engine::BlockPoolCounts counts = pool_->counts();
  if (counts.quarantined > kMaxQuarantined * counts.total) return false;

  Wanted wanted;
  wanted.first_block = cached;
  wanted.target.id = TransferId::Random();
  wanted.target.epoch = s->work.target.epoch;
  wanted.target.transport = options_.kv_transport;
  const auto blocks =
      s->lease.blocks().subspan(static_cast<size_t>(cached), static_cast<size_t>(end - cached));
  wanted.target.target_blocks.assign(blocks.begin(), blocks.end());
  absl::StatusOr<std::string> token =
      receiver_->Expect(wanted.target.id, wanted.target.epoch, wanted.target.target_blocks, peer);
  if (!token.ok()) {
    spdlog::warn("{}: blocks cannot come back from {}: {}", s->work.request_id, peer,
                 token.status().ToString());
    return false;
  }
  wanted.target.token = *std::move(token);

  const absl::Time now = clock_->Now();
  const TransferKey key = {wanted.target.id, wanted.target.epoch};
  s->coming_back = std::make_unique<Return>(Return{key, cached, end, now, 0, now});
  s->return_tried = true;
  if (s->trace != nullptr) s->trace->Add("prefill_queue", s->waits_since, now);
  s->phase = Phase::kReturning;
  transfers_[key].sequence = s;
  waiting_.push_back(s);
  s->work.want(wanted);
  return true;
}

Sequence* Returns::OnSealed(const TransferId& id, uint64_t epoch,
                            const kvtransfer::TransferStats& stats, int* blocks) {
  const auto it = transfers_.find(TransferKey{id, epoch});
  if (it == transfers_.end() || it->second.sequence == nullptr) return nullptr;
  Sequence* s = std::exchange(it->second.sequence, nullptr);
  *blocks = s->coming_back->end_block;
  s->returned = (*blocks - s->coming_back->first_block) * options_.block_size;
  metrics_->returned_tokens.Increment(s->returned);
  KvLinkMetrics& link =
      metrics_->worker.KvLink(s->work.target.peer_worker_id, options_.worker_id, stats.transport);
  link.seconds.Observe(absl::ToDoubleSeconds(stats.last_byte - stats.first_byte));
  link.bytes.Increment(static_cast<double>(stats.bytes));
  worker::AddKvTransfer(stats, s->work.target.peer_worker_id, options_.worker_id, s->trace.get());
  distrusted_.erase(s->work.target.peer_worker_id);
  End(s, ReturnResult::kSealed);
  return s;
}

Sequence* Returns::OnFailed(const TransferId& id, uint64_t epoch) const {
  const auto it = transfers_.find(TransferKey{id, epoch});
  return it == transfers_.end() ? nullptr : it->second.sequence;
}

void Returns::OnQuiet(const TransferId& id, uint64_t epoch) {
  const auto it = transfers_.find(TransferKey{id, epoch});
  if (it == transfers_.end()) return;
  TANDEM_CHECK(it->second.sequence == nullptr, "a transfer is quiet before it has ended");
  pool_->ReleaseQuarantine(it->second.ticket);
  transfers_.erase(it);
}

std::vector<Sequence*> Returns::Late() {
  std::vector<Sequence*> late;
  const absl::Time now = clock_->Now();
  for (Sequence* s : waiting_) {
    Return& coming = *s->coming_back;
    if (now - coming.progressed_at < options_.timeout) continue;
    const uint64_t bytes = receiver_->BytesArrived(coming.key.first, coming.key.second);
    if (bytes == coming.bytes_seen) {
      late.push_back(s);
    } else {
      coming.bytes_seen = bytes;
      coming.progressed_at = now;
    }
  }
  return late;
}

void Returns::Abandon(Sequence* s, ReturnResult why) {
  const Return coming = *s->coming_back;
  End(s, why);
  engine::BlockLease written = s->lease.SplitTail(coming.first_block);
  written.SplitTail(coming.end_block - coming.first_block).Release();
  Transfer& transfer = transfers_.at(coming.key);
  transfer.sequence = nullptr;
  // Before Cancel, which may say at once that they are quiet.
  transfer.ticket = pool_->Quarantine(std::move(written));
  receiver_->Cancel(coming.key.first, coming.key.second);
  if (why == ReturnResult::kCancelled) return;
  if (distrusted_.size() >= kMaxDistrusted) distrusted_.clear();
  Distrust& distrust = distrusted_[s->work.target.peer_worker_id];
  const int doublings = std::min(distrust.in_a_row++, 10);
  distrust.until = clock_->Now() + std::min(kLongestDistrust, kFirstDistrust * (1 << doublings));
}

void Returns::End(Sequence* s, ReturnResult result) {
  s->waits_since = clock_->Now();
  s->return_took = s->waits_since - s->coming_back->began_at;
  if (s->trace != nullptr) {
    const bool sealed = result == ReturnResult::kSealed;
    s->trace->Add("kv_return", s->coming_back->began_at, s->waits_since, {},
                  sealed ? absl::StatusCode::kOk : absl::StatusCode::kUnavailable);
  }
  s->coming_back.reset();
  std::erase(waiting_, s);
  metrics_->returns(result).Increment();
  metrics_->worker.stage(Stage::kKvReturn).Observe(absl::ToDoubleSeconds(s->return_took));
}

ReturnResult Returns::ResultOf(const absl::Status& failure) {
  return absl::IsDataLoss(failure) ? ReturnResult::kDamaged : ReturnResult::kLost;
}

}  // namespace tandem::prefill
