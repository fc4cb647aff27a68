#include <algorithm>
#include <numeric>
#include <utility>

#include "common/base/check.h"
#include "common/base/status.h"
#include "prefill_worker/loop.h"

namespace tandem::prefill {
namespace {

// Repeated requests are recognised among so many past transfers.
constexpr size_t kPastTransfers = 4096;
// Waiting prompts looked at per turn: finding their cached blocks costs time.
constexpr size_t kAdmissionWindow = 128;

}  // namespace

absl::Status PrefillLoop::Accept(const PrefillWork& work) const {
  if (stop_ || draining_) {
    return Unavailable("prefill worker {} is draining", options_.worker_id);
  }
  const TransferKey key = {work.target.id, work.target.epoch};
  if (sequences_.contains(key) || past_.contains(key)) {
    return AlreadyExists("transfer {} epoch {} was asked for already", work.target.id.ToHex(),
                         work.target.epoch);
  }
  const int blocks = BlocksFor(static_cast<int>(work.tokens.size()));
  const int total = parts_.pool->counts().total;
  if (blocks > total) {
    return InvalidArgument(
        "token_ids: {} prompt tokens need {} KV blocks, the worker's pool has {} (raise "
        "--kv-cache-memory-bytes)",
        work.tokens.size(), blocks, total);
  }
  if (static_cast<int>(waiting_.size()) >= options_.max_waiting) {
    return ResourceExhausted("prefill worker {}: {} prompts are waiting already (--max-waiting)",
                             options_.worker_id, waiting_.size());
  }
  return absl::OkStatus();
}

void PrefillLoop::Handle(PrefillArrived event) {
  PrefillWork& work = event.work;
  if (const absl::Status status = Accept(work); !status.ok()) {
    work.reply(status);
    return;
  }
  auto sequence = std::make_unique<Sequence>();
  sequence->seed = BlockHashSeed(options_.cluster_secret, options_.model_digest, work.cache_salt);
  sequence->work = std::move(work);
  Sequence* s = sequence.get();
  by_work_id_.emplace(s->work.id, s);
  sequences_.emplace(s->key(), std::move(sequence));
  // Higher priority first, else as they came.
  const auto behind = std::upper_bound(
      waiting_.begin(), waiting_.end(), s->work.priority,
      [](int priority, const Sequence* other) { return priority > other->work.priority; });
  waiting_.insert(behind, s);
}

void PrefillLoop::Handle(PrefillCancelled event) {
  const auto it = by_work_id_.find(event.id);
  if (it == by_work_id_.end()) return;
  parts_.metrics->requests_cancelled.Increment();
  Fail(it->second, Cancelled("prefill was cancelled by its caller or its deadline"));
}

void PrefillLoop::Handle(PrefillShipped event) {
  const auto it = sequences_.find(TransferKey{event.id, event.epoch});
  if (it == sequences_.end()) return;
  Sequence& s = *it->second;
  TANDEM_CHECK(s.phase != Phase::kWaiting, "a transfer ended that was never opened");
  KvLinkMetrics& link = parts_.metrics->KvLink(options_.worker_id, s.work.target.peer_worker_id,
                                               s.work.target.transport);
  link.bytes.Increment(static_cast<double>(event.stats.bytes));
  if (event.status.ok()) {
    link.seconds.Observe(absl::ToDoubleSeconds(event.stats.last_byte - event.stats.first_byte));
  } else {
    link.failures.Increment();
  }
  if (s.phase == Phase::kRunning) {
    // The peer is gone or gave up: nobody waits for this prompt any more.
    parts_.metrics->requests_failed.Increment();
    std::erase(running_, &s);
    by_work_id_.erase(s.work.id);
    s.work.reply(Unavailable("KV transfer to {} ended early: {}", s.work.target.peer_worker_id,
                             event.status.ToString()));
  }
  Forget(s);
}

void PrefillLoop::Handle(PrefillSnapshotWanted) {
  if (hooks_.blocks) hooks_.blocks(engine::BlockEvents{.stored = parts_.cache->Snapshot()}, true);
}

void PrefillLoop::Handle(PrefillDrainWanted) { draining_ = true; }

void PrefillLoop::Handle(PrefillStopWanted) {
  stop_ = true;
  const absl::Status status = Unavailable("prefill worker {} is stopping", options_.worker_id);
  std::vector<Sequence*> open;
  for (const auto& [id, sequence] : by_work_id_) open.push_back(sequence);
  for (Sequence* sequence : open) Fail(sequence, status);
}

int PrefillLoop::MaxCachedBlocks(const Sequence& s) const {
  // Logprobs of prompt tokens exist only where the tokens are computed. At least the last token is
  // computed too: its logits give the first new one.
  if (s.work.sampling.prompt_logprobs >= 0) return 0;
  return (s.length() - 1) / options_.layout.block_size;
}

void PrefillLoop::AdmitWaiting() {
  if (waiting_.empty()) return;
  const size_t window = std::min(waiting_.size(), kAdmissionWindow);
  std::vector<WaitingView> view;
  for (size_t i = 0; i < window; ++i) {
    const Sequence& s = *waiting_[i];
    int idle = 0;
    const int cached = parts_.cache->CountMatch(s.seed, s.work.tokens, MaxCachedBlocks(s), &idle);
    view.push_back({BlocksFor(s.length()) - cached + idle, s.times_passed});
  }
  const std::vector<int> admitted = NextAdmissions(view, parts_.pool->NumAvailable());
  if (admitted.empty()) return;
  std::vector<Sequence*> chosen;
  for (const int i : admitted) chosen.push_back(waiting_[static_cast<size_t>(i)]);
  for (int i = 0; i < admitted.back(); ++i) ++waiting_[static_cast<size_t>(i)]->times_passed;
  for (Sequence* sequence : chosen) {
    const absl::Status status = Admit(sequence);
    // An earlier one of this round may have evicted what this one would have shared.
    if (absl::IsResourceExhausted(status)) break;
    if (status.ok()) continue;
    parts_.metrics->requests_failed.Increment();
    Fail(sequence, status);
  }
}

absl::Status PrefillLoop::Admit(Sequence* sequence) {
  Sequence& s = *sequence;
  engine::BlockLease lease = parts_.cache->Match(s.seed, s.work.tokens, MaxCachedBlocks(s));
  const int cached_blocks = lease.size();
  TANDEM_ASSIGN_OR_RETURN(engine::BlockLease rest,
                          parts_.pool->Reserve(BlocksFor(s.length()) - cached_blocks));
  if (const absl::Status status = parts_.sender->Open(s.work.target); !status.ok()) {
    // RESOURCE_EXHAUSTED would say that blocks are short, and that waiting helps.
    const absl::StatusCode code =
        absl::IsResourceExhausted(status) ? absl::StatusCode::kUnavailable : status.code();
    return absl::Status(code, fmt::format("target: {}", std::string(status.message())));
  }
  lease.Append(std::move(rest));
  s.lease = std::move(lease);
  s.cached = s.computed = cached_blocks * options_.layout.block_size;
  s.inserted_blocks = s.pushed_blocks = cached_blocks;
  s.phase = Phase::kRunning;
  std::erase(waiting_, sequence);
  running_.push_back(sequence);
  ShipCached(s, 0, cached_blocks);
  return absl::OkStatus();
}

void PrefillLoop::ShareNewlyCached(Sequence* sequence) {
  Sequence& s = *sequence;
  const int held = s.computed / options_.layout.block_size;
  engine::BlockLease more =
      parts_.cache->MatchMore(s.seed, s.work.tokens, held, MaxCachedBlocks(s));
  if (more.empty()) return;
  const int cached_blocks = held + more.size();
  engine::BlockLease rest = s.lease.SplitTail(held).SplitTail(more.size());
  s.lease.Append(std::move(more));
  s.lease.Append(std::move(rest));
  s.cached = s.computed = cached_blocks * options_.layout.block_size;
  s.inserted_blocks = s.pushed_blocks = cached_blocks;
  ShipCached(s, held, cached_blocks);
}

void PrefillLoop::ShipCached(const Sequence& s, int from, int to) {
  from = std::max(from, s.work.first_block);
  if (from >= to) return;
  std::vector<int32_t> ordinals(static_cast<size_t>(to - from));
  std::iota(ordinals.begin(), ordinals.end(), from - s.work.first_block);
  const auto blocks = s.lease.blocks().subspan(static_cast<size_t>(from), ordinals.size());
  for (int layer = 0; layer < options_.layout.num_layers; ++layer) {
    parts_.sender->Push(s.work.target.id, s.work.target.epoch, layer, blocks, ordinals);
  }
}

void PrefillLoop::Forget(const Sequence& sequence) {
  const TransferKey key = sequence.key();
  sequences_.erase(key);
  past_.insert(key);
  past_order_.push_back(key);
  if (past_order_.size() <= kPastTransfers) return;
  past_.erase(past_order_.front());
  past_order_.pop_front();
}

}  // namespace tandem::prefill
