#include "kvtransfer/channel/sender_peer.h"

#include <algorithm>

#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/link_probe.h"
#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {
namespace {

// Payload of one DATA frame, unless a single piece is larger: enough to amortise the system calls,
// small enough that an abort or another transfer does not wait long.
constexpr size_t kFrameBytes = 1 << 20;
// Transfers below this are ruled by latency and say little about the link.
constexpr uint64_t kMinRateBytes = 256 << 10;
constexpr double kRateWeight = 0.2;  // of the newest transfer

}  // namespace

SenderPeer::SenderPeer(std::string address, std::string worker_id, const SenderContext* context)
    : address_(std::move(address)),
      worker_id_(std::move(worker_id)),
      context_(context),
      writer_([this] { WriterLoop(); }) {}

void SenderPeer::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    if (connection_ != nullptr) connection_->Shutdown();  // ends a Send() that waits
  }
  if (writer_.joinable()) writer_.join();
}

void SenderPeer::Open(KvSendTarget target) {
  absl::MutexLock lock(&mutex_);
  ++under_way_;
  queue_.push_back(OpenItem{std::move(target)});
}

void SenderPeer::Push(const TransferKey& key, int layer, std::span<const int32_t> source_blocks,
                      std::span<const int32_t> ordinals) {
  const size_t piece = context_->options->region.layout.BlockLayerBytes();
  const std::vector<OrdinalRun> runs =
      SplitIntoRuns(ordinals, std::max<size_t>(1, kFrameBytes / piece));
  absl::MutexLock lock(&mutex_);
  for (const OrdinalRun& run : runs) {
    const auto blocks = source_blocks.subspan(run.begin, run.count);
    queue_.push_back(
        PushItem{key, PushedRun{layer, ordinals[run.begin], {blocks.begin(), blocks.end()}}});
  }
}

void SenderPeer::Finish(const TransferKey& key) {
  absl::MutexLock lock(&mutex_);
  queue_.push_back(FinishItem{key});
}

void SenderPeer::Abort(const TransferKey& key) {
  absl::MutexLock lock(&mutex_);
  // An event, so that it overtakes what is queued; the writer skips what it overtook.
  events_.push_back(AbortEvent{key});
}

std::optional<std::pair<std::string, double>> SenderPeer::LinkRate() const {
  absl::MutexLock lock(&mutex_);
  if (rate_ <= 0) return std::nullopt;
  const std::string& name = !worker_id_.empty() ? worker_id_ : presented_id_;
  return std::make_pair(name.empty() ? address_ : name, rate_);
}

bool SenderPeer::idle() const {
  absl::MutexLock lock(&mutex_);
  return connection_ == nullptr && queue_.empty() && events_.empty() && under_way_ == 0;
}

void SenderPeer::WriterLoop() {
  const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !events_.empty() || !queue_.empty();
  };
  while (true) {
    std::deque<Event> events;
    std::optional<Item> item;
    {
      const absl::Time deadline = NextDeadline();
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(&ready), deadline - Clock::Real()->Now());
      if (stopping_) break;
      events.swap(events_);
      if (events.empty() && !queue_.empty()) {
        item = std::move(queue_.front());
        queue_.pop_front();
      }
    }
    for (const Event& event : events) {
      std::visit([this](const auto& e) { Handle(e); }, event);
    }
    if (item.has_value()) {
      std::visit([this](auto&& i) { Process(std::move(i)); }, *std::move(item));
    }
    TimeOutAnswers();
  }
  CloseConnection();
  const absl::Status closing = Cancelled("sender is closing");
  FailAll(closing, KvFailure::kCancelled);
  FailQueuedOpens(closing, KvFailure::kCancelled);
}

void SenderPeer::Handle(const AbortEvent& event) {
  const absl::Status why = Cancelled("aborted by the sender");
  if (!transfers_.contains(event.key)) {
    // Perhaps its OPEN is still queued: it goes out first, for only a known transfer can be quiet.
    std::optional<KvSendTarget> unopened;
    {
      absl::MutexLock lock(&mutex_);
      for (auto it = queue_.begin(); it != queue_.end(); ++it) {
        auto* open = std::get_if<OpenItem>(&*it);
        if (open == nullptr || open->target.id != event.key.id ||
            open->target.epoch != event.key.epoch) {
          continue;
        }
        unopened = std::move(open->target);
        queue_.erase(it);
        break;
      }
    }
    if (!unopened.has_value()) return;
    if (wire_ != nullptr) {
      Process(OpenItem{*std::move(unopened)});
    } else {
      // Nobody to tell; the receiver's own timeout says quiet.
      transfers_.emplace(event.key,
                         OutgoingTransfer(*std::move(unopened), 0, context_->transport->name()));
    }
  }
  SendQuiet(event.key, why);
  Done(event.key, why, KvFailure::kCancelled);
}

void SenderPeer::Handle(const PeerEvent& event) {
  const auto it = transfers_.find(event.key);
  if (event.type == FrameType::kAbort) {
    // Answered even if it is over here: the peer waits for quiet.
    const absl::Status why =
        event.status.ok() ? Cancelled("aborted by the receiver") : event.status;
    SendQuiet(event.key, why);
    if (it != transfers_.end()) Done(event.key, why, KvFailure::kPeerAborted);
    return;
  }
  if (it == transfers_.end()) return;
  if (event.status.ok()) {
    if (!it->second.finished) return;  // a stray frame: nothing can be sealed yet
    UpdateRate(it->second);
    Done(event.key, absl::OkStatus(), std::nullopt);
  } else {
    const bool mismatch = absl::IsDataLoss(event.status);
    Done(event.key, event.status, mismatch ? KvFailure::kDigestMismatch : KvFailure::kPeerAborted);
  }
}

void SenderPeer::Handle(const LostEvent& event) {
  if (event.generation == generation_ && wire_ != nullptr) LoseConnection(event.status);
}

void SenderPeer::Process(OpenItem item) {
  const TransferKey key = {item.target.id, item.target.epoch};
  const std::string token = item.target.token;
  FrameHeader header;
  header.type = FrameType::kOpen;
  header.id = key.id;
  header.epoch = key.epoch;
  header.ordinal_count = static_cast<uint32_t>(item.target.target_blocks.size());
  const auto [it, inserted] = transfers_.emplace(
      key, OutgoingTransfer(std::move(item.target), context_->options->region.layout.num_layers,
                            context_->transport->name()));
  if (absl::Status status = EnsureConnected(); !status.ok()) {
    spdlog::warn("kv link to {} ({}): {}", worker_id_, address_, std::string(status.message()));
    FailAll(status, KvFailure::kChannelLost);
    FailQueuedOpens(status, KvFailure::kChannelLost);
    return;
  }
  absl::Status status =
      ValidateBlocks("target_blocks", it->second.target.target_blocks, peer_num_blocks_);
  if (!status.ok()) {
    Done(key, status, KvFailure::kInvalid);
    return;
  }
  status = SendControl(wire_.get(), header, token, context_->options->io_timeout);
  if (!status.ok()) LoseConnection(status);
}

void SenderPeer::Process(PushItem item) {
  const auto it = transfers_.find(item.key);
  if (it == transfers_.end()) return;  // over already
  OutgoingTransfer& transfer = it->second;
  absl::Status status = transfer.Check(item.run, context_->options->region);
  if (status.ok() && transfer.finished) status = FailedPrecondition("pushed after Finish");
  if (!status.ok()) {
    SendQuiet(item.key, status);
    Done(item.key, status, KvFailure::kInvalid);
    return;
  }
  if (!transfer.AnySent(item.run)) {
    status = SendRun(&transfer, item.run);
  } else {
    // Rare (a caller that repeats itself): piece by piece, what is new.
    for (size_t i = 0; i < item.run.source_blocks.size() && status.ok(); ++i) {
      const PushedRun single = {item.run.layer,
                                item.run.ordinal_begin + static_cast<int32_t>(i),
                                {item.run.source_blocks[i]}};
      if (!transfer.AnySent(single)) status = SendRun(&transfer, single);
    }
  }
  if (!status.ok()) LoseConnection(status);
}

absl::Status SenderPeer::SendRun(OutgoingTransfer* transfer, const PushedRun& run) {
  const KvRegion& region = context_->options->region;
  const size_t count = run.source_blocks.size();
  const auto targets = std::span(transfer->target.target_blocks)
                           .subspan(static_cast<size_t>(run.ordinal_begin), count);
  const KvPoolShape source = {region.layout, region.num_blocks};
  // The peer's pool may have another number of blocks; a two-sided transport does not care.
  const KvPoolShape target = {region.layout, peer_num_blocks_};
  TANDEM_ASSIGN_OR_RETURN(const std::vector<CopyPiece> plan,
                          BuildCopyPlan(source, target, run.source_blocks, targets, run.layer, 1));
  std::vector<KvPiece> pieces;
  pieces.reserve(plan.size());
  for (const CopyPiece& piece : plan) {
    pieces.push_back({region.base + piece.source_offset, piece.bytes, piece.target_offset});
  }
  FrameHeader header;
  header.type = FrameType::kData;
  header.id = transfer->target.id;
  header.epoch = transfer->target.epoch;
  header.ordinal_begin = static_cast<uint32_t>(run.ordinal_begin);
  header.ordinal_count = static_cast<uint32_t>(count);
  header.layer_begin = static_cast<uint32_t>(run.layer);
  header.layer_count = 1;
  header.payload_bytes = static_cast<uint32_t>(count * region.layout.BlockLayerBytes());
  const absl::Time start = Clock::Real()->Now();
  if (transfer->stats.bytes == 0) transfer->stats.first_byte = start;
  transfer->Account(run, region);
  TANDEM_RETURN_IF_ERROR(wire_->Send(header, pieces, context_->options->io_timeout));
  transfer->stats.last_byte = Clock::Real()->Now();
  transfer->busy += transfer->stats.last_byte - start;
  context_->counters->bytes += header.payload_bytes;
  return absl::OkStatus();
}

void SenderPeer::Process(FinishItem item) {
  const auto it = transfers_.find(item.key);
  if (it == transfers_.end() || it->second.finished) return;
  OutgoingTransfer& transfer = it->second;
  if (transfer.missing > 0) {
    const absl::Status status = FailedPrecondition(
        "transfer {} finished with {} pieces never pushed", item.key.ToString(), transfer.missing);
    SendQuiet(item.key, status);
    Done(item.key, status, KvFailure::kInvalid);
    return;
  }
  FrameHeader header;
  header.type = FrameType::kFinish;
  header.id = item.key.id;
  header.epoch = item.key.epoch;
  transfer.finished = true;
  transfer.finished_at = Clock::Real()->Now();
  transfer.answer_deadline = transfer.finished_at + context_->options->io_timeout;
  const absl::Status status =
      SendControl(wire_.get(), header, transfer.DigestPayload(), context_->options->io_timeout);
  if (!status.ok()) LoseConnection(status);
}

void SenderPeer::SendQuiet(const TransferKey& key, const absl::Status& why) {
  if (wire_ == nullptr) return;
  // A failure is a dead connection, which is quiet too; its reader reports it.
  (void)SendStatus(wire_.get(), FrameType::kQuiet, key, why, context_->options->io_timeout);
}

absl::Time SenderPeer::NextDeadline() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [key, transfer] : transfers_) next = std::min(next, transfer.answer_deadline);
  return next;
}

void SenderPeer::TimeOutAnswers() {
  const absl::Time now = Clock::Real()->Now();
  std::vector<TransferKey> overdue;
  for (const auto& [key, transfer] : transfers_) {
    if (now >= transfer.answer_deadline) overdue.push_back(key);
  }
  for (const TransferKey& key : overdue) {
    const absl::Status status =
        DeadlineExceeded("{} did not answer FINISH within {}", address_,
                         absl::FormatDuration(context_->options->io_timeout));
    SendQuiet(key, status);
    Done(key, status, KvFailure::kTimeout);
  }
}

void SenderPeer::Done(const TransferKey& key, const absl::Status& status,
                      std::optional<KvFailure> failure) {
  const auto it = transfers_.find(key);
  if (it == transfers_.end()) return;
  const TransferStats stats = it->second.stats;
  transfers_.erase(it);
  if (failure.has_value()) {
    context_->counters->CountFailure(*failure);
  } else {
    ++context_->counters->transfers;
  }
  context_->done(key, status, stats);
  // Last, so that a peer inside a callback is never idle.
  absl::MutexLock lock(&mutex_);
  --under_way_;
}

void SenderPeer::FailAll(const absl::Status& status, KvFailure failure) {
  std::vector<TransferKey> keys;
  for (const auto& [key, transfer] : transfers_) keys.push_back(key);
  for (const TransferKey& key : keys) Done(key, status, failure);
}

void SenderPeer::FailQueuedOpens(const absl::Status& status, KvFailure failure) {
  std::vector<KvSendTarget> unopened;
  {
    absl::MutexLock lock(&mutex_);
    for (Item& item : queue_) {
      if (auto* open = std::get_if<OpenItem>(&item)) unopened.push_back(std::move(open->target));
    }
    queue_.clear();  // what else was queued belongs to transfers that have failed
  }
  for (KvSendTarget& target : unopened) {
    const TransferKey key = {target.id, target.epoch};
    transfers_.emplace(key, OutgoingTransfer(std::move(target), 0, context_->transport->name()));
    Done(key, status, failure);
  }
}

void SenderPeer::UpdateRate(const OutgoingTransfer& transfer) {
  if (transfer.stats.bytes < kMinRateBytes) return;
  // Time in which bytes were on their way: sending, and from FINISH until the peer had them all.
  // Waiting for the next layer's compute in between is not the link's doing.
  const absl::Duration busy = transfer.busy + (Clock::Real()->Now() - transfer.finished_at);
  const double rate =
      static_cast<double>(transfer.stats.bytes) / std::max(absl::ToDoubleSeconds(busy), 1e-9);
  absl::MutexLock lock(&mutex_);
  rate_ = rate_ <= 0 ? rate : (1 - kRateWeight) * rate_ + kRateWeight * rate;
}

}  // namespace tandem::kvtransfer
