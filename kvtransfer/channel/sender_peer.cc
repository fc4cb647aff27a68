#include "kvtransfer/channel/sender_peer.h"

#include <algorithm>
#include <pthread.h>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"

namespace tandem::kvtransfer {
namespace {

constexpr size_t kMaxPosts = 16;  // under way at a time
// Transfers below this are ruled by latency and say little about the link.
constexpr uint64_t kMinRateBytes = 256 << 10;
constexpr double kRateWeight = 0.2;  // of the newest transfer

}  // namespace

SenderPeer::SenderPeer(PeerAddress peer, const SenderContext* context)
    : peer_(std::move(peer)),
      context_(context),
      queue_(context->link.store->shape().layout.BlockLayerBytes(),
             context->link.store->BatchBytes()),
      thread_([this] { Loop(); }) {}

void SenderPeer::Stop() {
  queue_.Stop();
  if (thread_.joinable()) thread_.join();
}

void SenderPeer::Open(KvSendTarget target) {
  {
    absl::MutexLock lock(&mutex_);
    ++under_way_;
  }
  queue_.Push(OpenItem{std::move(target)});
}

void SenderPeer::Push(const TransferKey& key, int layer, std::span<const int32_t> source_blocks,
                      std::span<const int32_t> ordinals, std::shared_ptr<const ReadyEvent> ready) {
  const KvStore& store = *context_->link.store;
  // Payload of one DATA frame, unless a single piece is larger.
  const size_t pieces = queue_.frame_bytes() / store.shape().layout.BlockLayerBytes();
  for (const OrdinalRun& run : SplitIntoRuns(ordinals, std::max<size_t>(1, pieces))) {
    const auto blocks = source_blocks.subspan(run.begin, run.count);
    queue_.Push(PushItem{
        key, PushedRun{layer, 1, ordinals[run.begin], {blocks.begin(), blocks.end()}}, ready});
  }
}

void SenderPeer::Finish(const TransferKey& key) { queue_.Push(FinishItem{key}); }

void SenderPeer::Abort(const TransferKey& key) {
  // The peer's thread may sit in a dial or a send for long. What it has not opened it need not be
  // asked about, and nobody need be told: the receiver's blocks wait for nobody who never came.
  if (!queue_.TakeOpen(key).has_value()) return queue_.PushAbort(key);
  CountDone(key, Cancelled("aborted by the sender"), KvFailure::kCancelled, {});
}

std::optional<std::pair<std::string, KvLink>> SenderPeer::Link() const {
  absl::MutexLock lock(&mutex_);
  if (!found_.has_value()) return std::nullopt;
  const std::string& name = !peer_.worker_id.empty() ? peer_.worker_id : presented_id_;
  KvLink link = *found_;
  if (link.refused && Clock::Real()->Now() - refused_at_ >= context_->link.options->refused_for) {
    link.refused = false;
  }
  return std::make_pair(name.empty() ? peer_.address : name, std::move(link));
}

bool SenderPeer::idle() const {
  absl::MutexLock lock(&mutex_);
  return under_way_ == 0 && queue_.empty() && !queue_.connected();
}

void SenderPeer::Loop() {
  pthread_setname_np(pthread_self(), "tandem-kv-send");
  while (true) {
    queue_.Wait(/*items_wanted=*/posts_.size() < kMaxPosts, NextDeadline());
    if (queue_.stopping()) break;
    HandleAborts();
    HandleReplies();
    HandlePosts();
    if (posts_.size() < kMaxPosts && ConnectIfWanted()) {
      // A transfer that came only now has the next round connect.
      std::optional<SendItem> item = queue_.TakeItem(/*may_open=*/link_ != nullptr);
      if (item.has_value()) {
        std::visit([this](auto& i) { Process(std::move(i)); }, *item);
      }
    }
    TimeOutAnswers();
    SendQuiets();
  }
  CloseLink();
  const absl::Status closing = Cancelled("sender is closing");
  FailAll(closing, KvFailure::kCancelled);
  FailQueuedOpens(closing, KvFailure::kCancelled);
}

void SenderPeer::HandleAborts() {
  for (const TransferKey& key : queue_.TakeAborts()) {
    End(key, {Cancelled("aborted by the sender"), KvFailure::kCancelled, true});
  }
}

bool SenderPeer::StillWanted() {
  HandleAborts();
  return !posting_.has_value() || !transfers_.at(*posting_).end.has_value();
}

void SenderPeer::HandleReplies() {
  while (link_ != nullptr) {
    const absl::Status readable = link_->connection()->WaitReadable(absl::ZeroDuration());
    if (absl::IsDeadlineExceeded(readable)) return;
    const absl::Status status = readable.ok() ? ReadReply() : readable;
    if (!status.ok()) LoseLink(status);
  }
}

absl::Status SenderPeer::ReadReply() {
  const absl::Duration timeout = context_->link.options->io_timeout;
  KvConnection* connection = link_->connection();
  TANDEM_ASSIGN_OR_RETURN(const FrameHeader header, connection->ReceiveHeader(timeout));
  if (header.payload_bytes > kMaxControlPayload) {
    return InvalidArgument("{} frame of {} bytes", FrameTypeName(header.type),
                           header.payload_bytes);
  }
  TANDEM_ASSIGN_OR_RETURN(std::string payload, ReceiveControl(connection, header, timeout));
  const TransferKey key = {header.id, header.epoch};
  switch (header.type) {
    case FrameType::kOpened:
      HandleOpened(key, std::move(payload));
      return absl::OkStatus();
    case FrameType::kResult:
      HandleResult(key, StatusOfFrame(header, payload));
      return absl::OkStatus();
    case FrameType::kAbort: {
      // Answered even if it is over here: the peer waits for quiet.
      absl::Status why = StatusOfFrame(header, payload);
      if (why.ok()) why = Cancelled("aborted by the receiver");
      if (transfers_.contains(key)) {
        End(key, {why, KvFailure::kPeerAborted, true});
      } else {
        quiets_.emplace_back(key, why);
      }
      return absl::OkStatus();
    }
    case FrameType::kHelloOk:  // repeated
    case FrameType::kProbeAck:
    case FrameType::kSelected:
      return absl::OkStatus();
    default:
      return InvalidArgument("a receiver may not send {}", FrameTypeName(header.type));
  }
}

void SenderPeer::HandleResult(const TransferKey& key, const absl::Status& status) {
  const auto it = transfers_.find(key);
  if (it == transfers_.end()) return;
  if (!status.ok()) {
    const bool mismatch = absl::IsDataLoss(status);
    End(key, {status, mismatch ? KvFailure::kDigestMismatch : KvFailure::kPeerAborted, false});
    return;
  }
  if (!it->second.finished) return;  // a stray frame: nothing can be sealed yet
  UpdateRate(it->second);
  End(key, {absl::OkStatus(), std::nullopt, false});
}

void SenderPeer::HandleOpened(const TransferKey& key, std::string grant) {
  auto it = transfers_.find(key);
  if (it == transfers_.end() || it->second.granted) return;
  it->second.grant = std::move(grant);
  it->second.answer_deadline = absl::InfiniteFuture();
  const std::deque<PushedRun> parked = std::move(it->second.parked);
  for (const PushedRun& run : parked) {
    if (const absl::Status status = SendRun(key, run); !status.ok()) {
      LoseLink(status);
      return;
    }
  }
  it = transfers_.find(key);
  if (it == transfers_.end()) return;
  it->second.granted = true;  // last: FINISH waits for it, and must not overtake what was parked
  SendFinishIfDue(key);
}

void SenderPeer::HandlePosts() {
  // In any order: a transport may finish a small run before a large one.
  for (size_t i = 0; i < posts_.size();) {
    if (!posts_[i].post->Done()) {
      ++i;
      continue;
    }
    Posted posted = std::move(posts_[i]);
    posts_.erase(posts_.begin() + static_cast<ptrdiff_t>(i));
    if (const absl::Status status = Complete(std::move(posted)); !status.ok()) {
      LoseLink(status);
      return;
    }
  }
}

absl::Status SenderPeer::Complete(Posted posted) {
  const absl::Status status = posted.post->status();
  const auto it = transfers_.find(posted.key);
  if (it == transfers_.end()) return absl::OkStatus();
  OutgoingTransfer& transfer = it->second;
  --transfer.posts;
  if (status.ok()) {
    transfer.AddDigests(posted.ordinal_begin, posted.post->digests());
    transfer.stats.bytes += posted.bytes;
    transfer.stats.last_byte = Clock::Real()->Now();
    transfer.busy += transfer.stats.last_byte - posted.start;
    context_->link.counters->bytes += posted.bytes;
  }
  posted.post = nullptr;  // released before anything that may end the link
  if (!status.ok() && !absl::IsCancelled(status)) return status;
  if (transfer.end.has_value()) {
    if (transfer.posts == 0) Done(posted.key, *transfer.end);
  } else if (!status.ok()) {
    End(posted.key, {status, KvFailure::kPeerAborted, true});
  } else {
    SendFinishIfDue(posted.key);
  }
  return absl::OkStatus();
}

absl::Time SenderPeer::NextDeadline() const {
  absl::Time next = absl::InfiniteFuture();
  for (const auto& [key, transfer] : transfers_) next = std::min(next, transfer.answer_deadline);
  return next;
}

void SenderPeer::TimeOutAnswers() {
  const absl::Time now = Clock::Real()->Now();
  std::vector<TransferKey> late;
  for (const auto& [key, transfer] : transfers_) {
    if (now >= transfer.answer_deadline) late.push_back(key);
  }
  for (const TransferKey& key : late) {
    OutgoingTransfer& transfer = transfers_.at(key);
    transfer.answer_deadline = absl::InfiniteFuture();
    End(key, {DeadlineExceeded("{} did not answer {} within {}", peer_.address,
                               transfer.finished ? "FINISH" : "OPEN",
                               absl::FormatDuration(context_->link.options->io_timeout)),
              KvFailure::kTimeout, true});
  }
}

void SenderPeer::Process(OpenItem item) {
  const TransferKey key = {item.target.id, item.target.epoch};
  const std::string token = item.target.token;
  OutgoingTransfer& transfer =
      transfers_.emplace(key, OutgoingTransfer(std::move(item.target))).first->second;
  const KvPoolShape& peer = link_->peer().shape;
  transfer.Begin(peer.layout.num_layers, peer.heads(), link_->transport().name());
  absl::Status status =
      ValidateBlocks("target_blocks", transfer.target.target_blocks, peer.num_blocks);
  if (!status.ok()) {
    Done(key, {status, KvFailure::kInvalid, false});
    return;
  }
  FrameHeader header;
  header.type = FrameType::kOpen;
  header.id = key.id;
  header.epoch = key.epoch;
  header.ordinal_count = static_cast<uint32_t>(transfer.target.target_blocks.size());
  const absl::Duration timeout = context_->link.options->io_timeout;
  transfer.granted = !link_->transport().capabilities().one_sided;
  if (!transfer.granted) transfer.answer_deadline = Clock::Real()->Now() + timeout;
  status = SendControl(link_->connection(), header, token, timeout);
  if (!status.ok()) LoseLink(status);
}

void SenderPeer::Process(PushItem item) {
  const auto it = transfers_.find(item.key);
  if (it == transfers_.end() || it->second.end.has_value()) return;  // over already
  OutgoingTransfer& transfer = it->second;
  absl::Status status = transfer.Check(item.run, context_->link.store->shape());
  if (status.ok() && transfer.finish_wanted) status = FailedPrecondition("pushed after Finish");
  if (!status.ok()) {
    End(item.key, {status, KvFailure::kInvalid, true});
    return;
  }
  if (!transfer.granted) {
    transfer.parked.push_back(std::move(item.run));
    return;
  }
  status = SendRun(item.key, item.run);
  if (!status.ok()) LoseLink(status);
}

absl::Status SenderPeer::SendRun(const TransferKey& key, const PushedRun& run) {
  auto it = transfers_.find(key);
  if (it == transfers_.end() || it->second.end.has_value()) return absl::OkStatus();
  if (!it->second.AnySent(run)) return PostRun(&it->second, run);
  // Rare (a caller that repeats itself): block by block, what is new.
  for (int l = 0; l < run.layer_count; ++l) {
    for (size_t i = 0; i < run.source_blocks.size(); ++i) {
      it = transfers_.find(key);
      if (it == transfers_.end() || it->second.end.has_value()) return absl::OkStatus();
      const PushedRun single = {run.layer_begin + l,
                                1,
                                run.ordinal_begin + static_cast<int32_t>(i),
                                {run.source_blocks[i]}};
      if (!it->second.AnySent(single)) TANDEM_RETURN_IF_ERROR(PostRun(&it->second, single));
    }
  }
  return absl::OkStatus();
}

absl::Status SenderPeer::PostRun(OutgoingTransfer* transfer, const PushedRun& pushed) {
  const size_t count = pushed.source_blocks.size();
  const BlockRun run = {pushed.layer_begin, pushed.layer_count, transfer->heads,
                        pushed.source_blocks,
                        std::span(transfer->target.target_blocks)
                            .subspan(static_cast<size_t>(pushed.ordinal_begin), count)};
  FrameHeader header;
  header.type = FrameType::kData;
  header.id = transfer->target.id;
  header.epoch = transfer->target.epoch;
  header.ordinal_begin = static_cast<uint32_t>(pushed.ordinal_begin);
  header.ordinal_count = static_cast<uint32_t>(count);
  header.layer_begin = static_cast<uint32_t>(pushed.layer_begin);
  header.layer_count = static_cast<uint32_t>(pushed.layer_count);
  header.head_begin = static_cast<uint32_t>(run.heads.begin);
  header.head_count = static_cast<uint32_t>(run.heads.count);
  header.payload_bytes = static_cast<uint32_t>(run.Bytes(context_->link.store->shape().layout));
  Posted posted = {transfer->key(), pushed.ordinal_begin, header.payload_bytes,
                   Clock::Real()->Now(), nullptr};
  if (transfer->stats.bytes == 0) transfer->stats.first_byte = posted.start;
  transfer->MarkSent(pushed);
  ++transfer->posts;  // so that an abort leaves it alone as long as its blocks are read
  posting_ = posted.key;
  absl::StatusOr<std::unique_ptr<KvPost>> post =
      link_->writer()->Post(header, run, transfer->grant);
  posting_.reset();
  TANDEM_ASSIGN_OR_RETURN(posted.post, std::move(post));
  if (posted.post->Done()) return Complete(std::move(posted));
  posts_.push_back(std::move(posted));
  return absl::OkStatus();
}

void SenderPeer::Process(FinishItem item) {
  const auto it = transfers_.find(item.key);
  if (it == transfers_.end() || it->second.finish_wanted) return;
  it->second.finish_wanted = true;
  SendFinishIfDue(item.key);
}

void SenderPeer::SendFinishIfDue(const TransferKey& key) {
  const auto it = transfers_.find(key);
  if (it == transfers_.end()) return;
  OutgoingTransfer& transfer = it->second;
  if (!transfer.finish_wanted || transfer.finished || transfer.end.has_value() ||
      !transfer.granted || transfer.posts > 0) {
    return;
  }
  if (transfer.missing > 0) {
    End(key, {FailedPrecondition("transfer {} finished with {} pieces never pushed", key.ToString(),
                                 transfer.missing),
              KvFailure::kInvalid, true});
    return;
  }
  FrameHeader header;
  header.type = FrameType::kFinish;
  header.id = key.id;
  header.epoch = key.epoch;
  header.head_begin = static_cast<uint32_t>(transfer.heads.begin);
  header.head_count = static_cast<uint32_t>(transfer.heads.count);
  transfer.finished = true;
  transfer.finished_at = Clock::Real()->Now();
  transfer.answer_deadline = transfer.finished_at + context_->link.options->io_timeout;
  const absl::Status status = SendControl(link_->connection(), header, transfer.DigestPayload(),
                                          context_->link.options->io_timeout);
  if (!status.ok()) LoseLink(status);
}

void SenderPeer::SendQuiets() {
  while (link_ != nullptr && !quiets_.empty()) {
    const auto [key, why] = std::move(quiets_.front());
    quiets_.pop_front();
    // A failure is a dead connection, which the next look at it finds.
    (void)SendStatus(link_->connection(), FrameType::kQuiet, key, why,
                     context_->link.options->io_timeout);
  }
}

void SenderPeer::End(const TransferKey& key, TransferEnd end) {
  const auto it = transfers_.find(key);
  if (it == transfers_.end() || it->second.end.has_value()) return;
  if (it->second.posts > 0) {
    it->second.end = std::move(end);  // Complete() of the last post does the rest
    for (const Posted& posted : posts_) {
      if (posted.key == key) posted.post->Abandon();
    }
    return;
  }
  Done(key, end);
}

void SenderPeer::Done(const TransferKey& key, const TransferEnd& wanted) {
  const auto it = transfers_.find(key);
  if (it == transfers_.end()) return;
  const TransferEnd end = wanted;  // may be the transfer's own
  const TransferStats stats = it->second.stats;
  transfers_.erase(it);
  queue_.Drop(key);
  if (end.tell_quiet) quiets_.emplace_back(key, end.status);
  CountDone(key, end.status, end.failure, stats);
}

void SenderPeer::CountDone(const TransferKey& key, const absl::Status& status,
                           std::optional<KvFailure> failure, const TransferStats& stats) {
  if (failure.has_value()) {
    context_->link.counters->CountFailure(*failure);
  } else {
    ++context_->link.counters->transfers;
  }
  context_->done(key, status, stats);
  // Last, so that a peer inside a callback is never idle.
  absl::MutexLock lock(&mutex_);
  --under_way_;
}

void SenderPeer::FailAll(const absl::Status& status, KvFailure failure) {
  std::vector<TransferKey> keys;
  for (const auto& [key, transfer] : transfers_) keys.push_back(key);
  for (const TransferKey& key : keys) Done(key, {status, failure, false});
}

void SenderPeer::FailQueuedOpens(const absl::Status& status, KvFailure failure) {
  for (KvSendTarget& target : queue_.TakeAllOpens()) {
    const TransferKey key = {target.id, target.epoch};
    transfers_.emplace(key, OutgoingTransfer(std::move(target)));
    Done(key, {status, failure, false});
  }
}

bool SenderPeer::ConnectIfWanted() {
  if (link_ != nullptr) return true;
  // Queued transfers stay there until there is a connection, so that they can be given up.
  const std::optional<std::string> transports = queue_.NextTransports();
  if (!transports.has_value()) return true;  // what is queued belongs to transfers that are over
  const absl::Status status = Connect(*transports);
  if (status.ok()) return true;
  spdlog::warn("kv link to {} ({}): {}", peer_.worker_id, peer_.address, MessageOf(status));
  FailAll(status, KvFailure::kConnectionLost);
  FailQueuedOpens(status, KvFailure::kConnectionLost);
  return false;
}

absl::Status SenderPeer::Connect(const std::string& transports) {
  PeerAddress peer = peer_;
  peer.transports = transports;
  std::optional<KvLink> refused;
  auto connected = SenderLink::Connect(
      context_->link, peer,
      [this](std::shared_ptr<KvConnection> dialed) {
        return queue_.SetConnection(std::move(dialed));
      },
      &refused);
  if (!connected.ok()) {
    queue_.SetConnection(nullptr);
    if (refused.has_value()) {
      absl::MutexLock lock(&mutex_);
      found_ = std::move(refused);
      refused_at_ = Clock::Real()->Now();
    }
    return connected.status();
  }
  link_ = *std::move(connected);
  link_->connection()->SetStillWanted([this] { return StillWanted(); });
  const size_t frame_bytes = link_->transport().capabilities().frame_bytes;
  queue_.SetFrameBytes(frame_bytes > 0 ? frame_bytes : context_->link.store->BatchBytes());
  absl::MutexLock lock(&mutex_);
  presented_id_ = link_->peer().worker_id;
  found_ = link_->found();
  return absl::OkStatus();
}

void SenderPeer::CloseLink() {
  if (link_ != nullptr) link_->writer()->Stop();
  posts_.clear();  // waits until no source is read any more: only then may the writer detach
  quiets_.clear();
  link_.reset();
  queue_.SetConnection(nullptr);
}

void SenderPeer::LoseLink(const absl::Status& status) {
  CloseLink();
  if (queue_.stopping()) return;  // this end shut the connection; Loop() fails what is left
  spdlog::log(transfers_.empty() ? spdlog::level::info : spdlog::level::warn,
              "kv link to {} ({}) lost with {} transfers under way: {}", peer_.worker_id,
              peer_.address, transfers_.size(), MessageOf(status));
  // Transfers whose OPEN is still queued go out on the next connection.
  FailAll(Unavailable("kv link to {} lost: {}", peer_.address, MessageOf(status)),
          KvFailure::kConnectionLost);
}

void SenderPeer::UpdateRate(const OutgoingTransfer& transfer) {
  if (transfer.stats.bytes < kMinRateBytes) return;
  // Time in which bytes were on their way: sending, and from FINISH until the peer had them all.
  // Waiting for the next layer's compute in between is not the link's doing.
  const absl::Duration busy = transfer.busy + (Clock::Real()->Now() - transfer.finished_at);
  const double rate =
      static_cast<double>(transfer.stats.bytes) / std::max(absl::ToDoubleSeconds(busy), 1e-9);
  const double before = link_->found().bytes_per_second;
  link_->NoteRate(before <= 0 ? rate : (1 - kRateWeight) * before + kRateWeight * rate);
  absl::MutexLock lock(&mutex_);
  found_ = link_->found();
}

}  // namespace tandem::kvtransfer
