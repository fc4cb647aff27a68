#include "kvtransfer/channel/incoming_transfer.h"

#include <algorithm>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/hmac.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/frame_reception.h"
#include "kvtransfer/channel/transfer_table.h"

namespace tandem::kvtransfer {
namespace {

// How often the end of a one-sided writer is looked for, once its connection is lost.
constexpr absl::Duration kFencePeriod = absl::Milliseconds(10);

}  // namespace

IncomingTransfer::IncomingTransfer(const TransferKey& key, std::vector<int32_t> blocks,
                                   std::string token, std::string sender,
                                   const ReceiverContext* context)
    : key_(key),
      blocks_(std::move(blocks)),
      token_(std::move(token)),
      sender_(std::move(sender)),
      context_(context),
      arrival_(blocks_.size(), context->store->shape().layout.num_layers,
               context->store->shape().heads()) {}

bool IncomingTransfer::quiet() const {
  absl::MutexLock lock(&mutex_);
  return quiet_;
}

uint64_t IncomingTransfer::bytes_arrived() const {
  absl::MutexLock lock(&mutex_);
  return stats_.bytes;
}

bool IncomingTransfer::TokenMatches(std::string_view token) const {
  return EqualInConstantTime(token, token_);
}

absl::StatusOr<std::string> IncomingTransfer::Open(const BoundConnection& bound,
                                                   uint32_t num_blocks) {
  absl::MutexLock lock(&mutex_);
  if (state_ == State::kOpen && opened_by_ == bound.connection.get()) return grant_;
  if (opened_by_ == bound.connection.get()) return std::string();  // over: the answer was RESULT
  if (opened_by_ != nullptr) return AlreadyExists("transfer was opened on another connection");
  if (state_ != State::kExpected) return Cancelled("transfer was given up by the receiver");
  if (num_blocks != blocks_.size()) {
    return InvalidArgument("receiver expects {} blocks, sender has {}", blocks_.size(), num_blocks);
  }
  if (bound.transport->capabilities().one_sided) {
    TANDEM_ASSIGN_OR_RETURN(grant_, bound.reader->Grant());
  }
  bound_ = bound;
  opened_by_ = bound.connection.get();
  stats_.transport = bound.transport->name();
  state_ = State::kOpen;
  return grant_;
}

absl::Status IncomingTransfer::CheckData(const FrameHeader& header) const {
  // DecodeHeader has bounded every field, so sums fit; the product is checked in 64 bits.
  const KvPoolShape& shape = context_->store->shape();
  const HeadRange heads = HeadsOf(header);
  if (header.ordinal_begin + header.ordinal_count > blocks_.size() ||
      header.layer_begin + header.layer_count > static_cast<uint32_t>(shape.layout.num_layers) ||
      !shape.heads().Contains(heads)) {
    return InvalidArgument(
        "DATA for ordinals [{}, +{}) of {}, layers [{}, +{}) of {}, heads [{}, +{}) of [{}, {})",
        header.ordinal_begin, header.ordinal_count, blocks_.size(), header.layer_begin,
        header.layer_count, shape.layout.num_layers, header.head_begin, header.head_count,
        shape.heads().begin, shape.heads().end());
  }
  const uint64_t pages = uint64_t{2} * header.ordinal_count * header.layer_count;
  const uint64_t bytes = header.head_count * shape.layout.PageBytes();
  if (pages > kMaxDataPayload || bytes > kMaxDataPayload || pages * bytes != header.payload_bytes) {
    return InvalidArgument("DATA frame of {} bytes for {} runs of pages of {}",
                           header.payload_bytes, pages, bytes);
  }
  return absl::OkStatus();
}

HeadRange IncomingTransfer::HeadsOf(const FrameHeader& header) {
  return {static_cast<int>(header.head_begin), static_cast<int>(header.head_count)};
}

std::vector<TargetPiece> IncomingTransfer::PlanPieces(const FrameHeader& header,
                                                      bool* any_wanted) const {
  const KvPoolShape& shape = context_->store->shape();
  const uint64_t page_bytes = shape.layout.PageBytes();
  std::vector<TargetPiece> pieces;
  pieces.reserve(size_t{header.layer_count} * header.ordinal_count);
  *any_wanted = false;
  const auto append = [&](uint64_t offset, uint64_t bytes, bool wanted) {
    *any_wanted = *any_wanted || wanted;
    if (!pieces.empty() && pieces.back().wanted == wanted &&
        (!wanted || pieces.back().target_offset + pieces.back().bytes == offset)) {
      pieces.back().bytes += bytes;
    } else {
      pieces.push_back({offset, bytes, wanted});
    }
  };
  const HeadRange heads = HeadsOf(header);
  for (uint32_t l = 0; l < header.layer_count; ++l) {
    const auto layer = static_cast<int>(header.layer_begin + l);
    for (uint32_t i = 0; i < header.ordinal_count; ++i) {
      const size_t ordinal = header.ordinal_begin + i;
      // Almost always the whole block is new: its pages of a kind lie one behind the other.
      const bool whole = !arrival_.HasAny(layer, ordinal, heads);
      for (const PageKind kind : {PageKind::kKey, PageKind::kValue}) {
        if (whole) {
          append(shape.PageOffset(layer, blocks_[ordinal], kind, heads.begin),
                 static_cast<uint64_t>(heads.count) * page_bytes, true);
          continue;
        }
        for (int head = heads.begin; head < heads.end(); ++head) {
          append(shape.PageOffset(layer, blocks_[ordinal], kind, head), page_bytes,
                 !arrival_.Has(layer, ordinal, head));
        }
      }
    }
  }
  return pieces;
}

absl::StatusOr<IncomingTransfer::Receipt> IncomingTransfer::ReceiveData(const BoundConnection& from,
                                                                        const FrameHeader& header) {
  TANDEM_RETURN_IF_ERROR(CheckData(header));
  const KvConnection* connection = from.connection.get();
  std::shared_ptr<Reception> reception;
  bool any_wanted = false;
  bool over = false;
  {
    absl::MutexLock lock(&mutex_);
    over = opened_by_ == connection && (state_ == State::kSealed || state_ == State::kFailed);
    if (WritableBy(connection)) {
      std::vector<TargetPiece> pieces = PlanPieces(header, &any_wanted);
      if (any_wanted && stats_.bytes == 0) stats_.first_byte = Now();
      reception = std::make_shared<TransferReception>(shared_from_this(), connection, header,
                                                      std::move(pieces));
    }
  }
  const bool writable = reception != nullptr;
  if (!writable || !any_wanted) reception = std::make_shared<UnwantedReception>(header);
  TANDEM_RETURN_IF_ERROR(from.reader->Receive(header, std::move(reception)));
  if (!writable) {
    // After its RESULT the sender needs no further answer: a duplicate, not a disagreement.
    ++context_->counters->late_frames;
    return over ? Receipt::kTaken : Receipt::kLate;
  }
  if (!any_wanted) ++context_->counters->duplicate_frames;
  return Receipt::kTaken;
}

bool IncomingTransfer::WriteIfOpen(const KvConnection* connection,
                                   absl::FunctionRef<void()> write) {
  absl::MutexLock lock(&mutex_);
  if (!WritableBy(connection)) return false;
  write();
  return true;
}

void IncomingTransfer::Arrived(const KvConnection* connection, const FrameHeader& header) {
  const KvLayout& layout = context_->store->shape().layout;
  const HeadRange heads = {static_cast<int>(header.head_begin),
                           static_cast<int>(header.head_count)};
  // So much per lock: the pool may not be read after a Cancel() either, which waits so long. Whole
  // layers where several fit, else some blocks of one.
  const size_t block_bytes = 2 * std::max<size_t>(1, header.head_count) * layout.PageBytes();
  const size_t batch =
      std::max<size_t>(1, context_->store->DigestBatchBytes() / block_bytes);  // blocks of a layer
  const auto blocks = std::min<uint32_t>(header.ordinal_count, static_cast<uint32_t>(batch));
  const auto layers = static_cast<uint32_t>(std::max<size_t>(1, batch / std::max(1u, blocks)));
  for (uint32_t layer = 0; layer < header.layer_count; layer += layers) {
    for (uint32_t block = 0; block < header.ordinal_count; block += blocks) {
      BlockRun run;
      run.layer_begin = static_cast<int>(header.layer_begin + layer);
      run.layer_count = static_cast<int>(std::min(layers, header.layer_count - layer));
      run.heads = heads;
      const size_t begin = header.ordinal_begin + block;
      run.source_blocks =
          std::span(blocks_).subspan(begin, std::min(blocks, header.ordinal_count - block));
      if (!AddDigests(connection, run, begin)) return;
    }
  }
  SealOrFail(connection);
}

bool IncomingTransfer::AddDigests(const KvConnection* connection, const BlockRun& run,
                                  size_t first_ordinal) {
  const auto heads = static_cast<size_t>(run.heads.count);
  const size_t blocks = run.source_blocks.size();
  std::vector<uint64_t> digests(static_cast<size_t>(run.layer_count) * blocks * heads);
  if (digests.empty()) return true;
  absl::MutexLock lock(&mutex_);
  if (!WritableBy(connection)) return false;
  context_->store->Digest(run, digests);
  size_t added = 0;  // heads of blocks of a layer
  auto digest = digests.begin();
  for (int layer = run.layer_begin; layer < run.layer_begin + run.layer_count; ++layer) {
    for (size_t i = 0; i < blocks; ++i) {
      for (int head = run.heads.begin; head < run.heads.end(); ++head) {
        added += arrival_.Add(layer, first_ordinal + i, head, *digest++) ? 1 : 0;
      }
    }
  }
  const uint64_t bytes = 2 * added * context_->store->shape().layout.PageBytes();
  stats_.bytes += bytes;
  context_->counters->bytes += bytes;
  stats_.last_byte = Now();
  // What is on its way comes after FINISH where receptions end late: it gets its time again.
  if (arrival_.AllFinished()) deadline_ = Now() + context_->options->incomplete_timeout;
  return true;
}

absl::StatusOr<IncomingTransfer::Receipt> IncomingTransfer::Finish(const KvConnection* connection,
                                                                   const HeadRange& heads,
                                                                   std::vector<uint64_t> digests) {
  {
    absl::MutexLock lock(&mutex_);
    if (!WritableBy(connection)) {
      ++context_->counters->late_frames;
      const bool over = opened_by_ == connection && state_ != State::kCancelled;
      return over ? Receipt::kTaken : Receipt::kLate;
    }
    if (digests.size() != blocks_.size() || heads.count < 1 ||
        !context_->store->shape().heads().Contains(heads)) {
      return InvalidArgument("FINISH with {} digests for {} blocks, heads [{}, +{})",
                             digests.size(), blocks_.size(), heads.begin, heads.count);
    }
    if (!arrival_.Finish(heads, std::move(digests))) {
      ++context_->counters->duplicate_frames;
      return Receipt::kTaken;
    }
    if (arrival_.AllFinished()) deadline_ = Now() + context_->options->incomplete_timeout;
    if (blocks_.empty()) stats_.first_byte = stats_.last_byte = Now();
  }
  SealOrFail(connection);
  return Receipt::kTaken;
}

void IncomingTransfer::SealOrFail(const KvConnection* connection) {
  absl::Status outcome;
  {
    absl::MutexLock lock(&mutex_);
    if (!WritableBy(connection) || !arrival_.Complete()) return;
    if (const ptrdiff_t ordinal = arrival_.FirstMismatch(); ordinal >= 0) {
      outcome =
          DataLoss("transfer {}: block {} (ordinal {}) does not have the digest it was sent with",
                   key_.ToString(), blocks_[static_cast<size_t>(ordinal)], ordinal);
    }
  }
  Settle(outcome, KvFailure::kDigestMismatch, /*writer_ended=*/true);
}

void IncomingTransfer::SenderQuiet(const KvConnection* connection, const absl::Status& reason) {
  {
    absl::MutexLock lock(&mutex_);
    if (opened_by_ != connection) return;
  }
  Settle(Aborted("sender gave up: {}", MessageOf(reason)), KvFailure::kPeerAborted,
         /*writer_ended=*/true);
}

void IncomingTransfer::ConnectionLost(const KvConnection* connection, const absl::Status& reason) {
  {
    absl::MutexLock lock(&mutex_);
    if (opened_by_ != connection) return;
    lost_ = true;
  }
  Settle(Unavailable("connection lost: {}", MessageOf(reason)), KvFailure::kConnectionLost,
         /*writer_ended=*/false);
}

void IncomingTransfer::Close() {
  Settle(Cancelled("receiver is closing"), KvFailure::kCancelled, /*writer_ended=*/true);
  BecomeQuiet();
}

void IncomingTransfer::Settle(const absl::Status& outcome, KvFailure reason, bool writer_ended) {
  TransferStats stats;
  std::shared_ptr<KvConnection> connection;
  bool cancelled = false;
  {
    absl::MutexLock lock(&mutex_);
    cancelled = state_ == State::kCancelled;
    // Whoever came first also makes it quiet, after the callback that may still run.
    if (!cancelled && state_ != State::kExpected && state_ != State::kOpen) return;
    connection = bound_.connection;
    if (!cancelled) {
      state_ = outcome.ok() ? State::kSealed : State::kFailed;
      notifying_ = std::this_thread::get_id();
      stats = stats_;
      deadline_ = absl::InfiniteFuture();
    }
  }
  if (!cancelled) {
    // Where nothing writes any more, before the callbacks: a worker that has heard of the end may
    // name the blocks again at once.
    if (writer_ended) context_->table->Release(*this);
    const KvReceiverOptions& options = *context_->options;
    if (outcome.ok()) {
      ++context_->counters->transfers;
      if (options.on_sealed) options.on_sealed(key_.id, key_.epoch, stats);
    } else {
      context_->counters->CountFailure(reason);
      spdlog::warn("kv transfer {} failed: {}", key_.ToString(), MessageOf(outcome));
      if (options.on_failed) options.on_failed(key_.id, key_.epoch, outcome);
    }
    absl::MutexLock lock(&mutex_);
    notifying_ = std::thread::id();
  }
  if (writer_ended) {
    BecomeQuiet();
  } else {
    BecomeQuietOnceWriterIsGone();
  }
  const bool sender_waits =
      outcome.ok() || reason == KvFailure::kDigestMismatch || reason == KvFailure::kIncomplete;
  if (connection != nullptr && sender_waits) {
    // Where Cancel() came between the decision and here, its ABORT no longer goes out. A failure
    // here is a dead connection, which its reading thread notices by itself.
    const absl::Status result = cancelled ? Cancelled("cancelled by the receiver") : outcome;
    (void)SendStatus(connection.get(), FrameType::kResult, key_, result, kReplyTimeout);
  }
}

void IncomingTransfer::BecomeQuietOnceWriterIsGone() {
  {
    absl::MutexLock lock(&mutex_);
    if (quiet_) return;
    if (bound_.reader != nullptr && !bound_.reader->WriterGone()) {
      if (!std::exchange(fenced_, true)) {
        ++context_->counters->fenced_transfers;
        spdlog::warn(
            "kv transfer {}: the connection is lost, but its writer is not known to have ended; "
            "{} blocks wait for that",
            key_.ToString(), blocks_.size());
        // What it gave to a card meanwhile ends soon.
        if (!grant_.empty()) bound_.reader->Revoke(grant_);
      }
      deadline_ = Now() + kFencePeriod;
      return;
    }
  }
  BecomeQuiet();
}

void IncomingTransfer::BecomeQuiet() {
  {
    absl::MutexLock lock(&mutex_);
    if (quiet_) return;
    quiet_ = true;
    deadline_ = absl::InfiniteFuture();
    abort_due_ = false;
    if (!grant_.empty()) bound_.reader->Release(grant_);
    grant_.clear();
    // It may be remembered for long: keep neither the socket nor the bookkeeping.
    bound_ = BoundConnection();
    arrival_.Clear();
  }
  context_->table->Release(*this);
  if (context_->options->on_quiet) context_->options->on_quiet(key_.id, key_.epoch);
}

void IncomingTransfer::Cancel() {
  absl::MutexLock lock(&mutex_);
  const auto settled = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return notifying_ == std::thread::id();
  };
  if (notifying_ != std::this_thread::get_id()) mutex_.Await(absl::Condition(&settled));
  if (state_ != State::kExpected && state_ != State::kOpen) return;
  const bool opened = state_ == State::kOpen;
  state_ = State::kCancelled;
  context_->counters->CountFailure(KvFailure::kCancelled);
  if (!grant_.empty()) bound_.reader->Revoke(grant_);
  abort_due_ = opened;
  // A transfer that nobody has opened is quiet already, for Open() now refuses it: the next Tick
  // says so.
  deadline_ = opened ? Now() + context_->options->quiet_timeout : absl::InfinitePast();
}

void IncomingTransfer::SendAbortIfDue() {
  std::shared_ptr<KvConnection> connection;
  {
    absl::MutexLock lock(&mutex_);
    if (!std::exchange(abort_due_, false) || lost_) return;
    connection = bound_.connection;
  }
  (void)SendStatus(connection.get(), FrameType::kAbort, key_,
                   Cancelled("cancelled by the receiver"), kReplyTimeout);
}

IncomingTransfer::Due IncomingTransfer::TakeDue(absl::Time now) {
  absl::MutexLock lock(&mutex_);
  if (quiet_ || now < deadline_) return Due::kNothing;
  if (lost_) return Due::kWriterCheck;
  deadline_ = absl::InfiniteFuture();
  if (state_ == State::kOpen) return Due::kIncomplete;
  return opened_by_ == nullptr ? Due::kNeverOpened : Due::kNoAnswer;
}

absl::Time IncomingTransfer::Tick(absl::Time now) {
  SendAbortIfDue();
  switch (TakeDue(now)) {
    case Due::kNothing:
      break;
    case Due::kWriterCheck:
      BecomeQuietOnceWriterIsGone();
      break;
    case Due::kIncomplete:
      Settle(DataLoss("transfer {}: the sender finished, but pages never arrived", key_.ToString()),
             KvFailure::kIncomplete, /*writer_ended=*/true);
      break;
    case Due::kNeverOpened:
      BecomeQuiet();
      break;
    case Due::kNoAnswer:
      ShutDownConnection();
      break;
  }
  absl::MutexLock lock(&mutex_);
  return deadline_;
}

void IncomingTransfer::ShutDownConnection() {
  std::shared_ptr<KvConnection> connection;
  {
    absl::MutexLock lock(&mutex_);
    connection = bound_.connection;
  }
  if (connection == nullptr) return;  // it has become quiet in the meantime
  spdlog::warn("kv transfer {}: {} does not answer the abort; closing its connection",
               key_.ToString(), connection->peer());
  connection->Shutdown();  // its reading thread ends and reports the connection lost
}

}  // namespace tandem::kvtransfer
