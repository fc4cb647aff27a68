#include "kvtransfer/channel/incoming_transfer.h"

#include <algorithm>
#include <array>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/transfer_table.h"

namespace tandem::kvtransfer {
namespace {

// What one read under the lock takes at most: bounds how long Cancel() waits.
constexpr size_t kMaxReadBytes = 512 << 10;
// Replies are small and rare; a peer whose buffer is full of them does not read and is dead.
constexpr absl::Duration kReplyTimeout = absl::Seconds(2);

}  // namespace

IncomingTransfer::IncomingTransfer(const TransferKey& key, std::vector<int32_t> blocks,
                                   std::string token, const ReceiverContext* context)
    : key_(key), blocks_(std::move(blocks)), token_(std::move(token)), context_(context) {
  missing_ = blocks_.size() * static_cast<size_t>(context->options->region.layout.num_layers);
  arrived_.resize(missing_, false);
  digests_.resize(blocks_.size(), 0);
  stats_.transport = context->transport;
}

bool IncomingTransfer::quiet() const {
  absl::MutexLock lock(&mutex_);
  return quiet_;
}

bool IncomingTransfer::TokenMatches(std::string_view token) const {
  if (token.size() != token_.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < token.size(); ++i) {
    difference |= static_cast<unsigned char>(token[i]) ^ static_cast<unsigned char>(token_[i]);
  }
  return difference == 0;
}

absl::Status IncomingTransfer::Open(const std::shared_ptr<KvConnection>& connection,
                                    uint32_t num_blocks) {
  absl::MutexLock lock(&mutex_);
  if (bound_ == connection.get()) return absl::OkStatus();
  if (bound_ != nullptr) return AlreadyExists("transfer was opened on another channel");
  if (quiet_ || expired_) return Cancelled("transfer is over at the receiver");
  if (num_blocks != blocks_.size()) {
    return InvalidArgument("receiver expects {} blocks, sender has {}", blocks_.size(), num_blocks);
  }
  connection_ = connection;
  bound_ = connection.get();
  if (state_ == State::kCancelled) {
    // Bound all the same: its sender will say quiet, or its channel will die.
    deadline_ = Clock::Real()->Now() + context_->options->quiet_timeout;
    return Cancelled("transfer was cancelled by the receiver");
  }
  state_ = State::kOpen;
  return absl::OkStatus();
}

std::byte* IncomingTransfer::Target(uint32_t layer, uint32_t ordinal) const {
  return context_->options->region.Block(static_cast<int>(layer), blocks_[ordinal]);
}

absl::Status IncomingTransfer::CheckDataHeader(const FrameHeader& header) const {
  // DecodeHeader has bounded every field, so sums fit; the product is checked in 64 bits.
  const KvLayout& layout = context_->options->region.layout;
  if (header.ordinal_begin + header.ordinal_count > blocks_.size() ||
      header.layer_begin + header.layer_count > static_cast<uint32_t>(layout.num_layers)) {
    return InvalidArgument("DATA for ordinals [{}, +{}) of {}, layers [{}, +{}) of {}",
                           header.ordinal_begin, header.ordinal_count, blocks_.size(),
                           header.layer_begin, header.layer_count, layout.num_layers);
  }
  const uint64_t pieces = uint64_t{header.ordinal_count} * header.layer_count;
  if (pieces > kMaxDataPayload || pieces * layout.BlockLayerBytes() != header.payload_bytes) {
    return InvalidArgument("DATA frame of {} bytes for {} pieces of {}", header.payload_bytes,
                           pieces, layout.BlockLayerBytes());
  }
  return absl::OkStatus();
}

std::vector<IncomingTransfer::Segment> IncomingTransfer::PlanSegments(const FrameHeader& header,
                                                                      bool* wanted) const {
  const size_t bytes = context_->options->region.layout.BlockLayerBytes();
  std::vector<Segment> segments;
  *wanted = false;
  for (uint32_t l = 0; l < header.layer_count; ++l) {
    for (uint32_t i = 0; i < header.ordinal_count; ++i) {
      const uint32_t layer = header.layer_begin + l;
      const uint32_t ordinal = header.ordinal_begin + i;
      std::byte* target = arrived_[Bit(layer, ordinal)] ? nullptr : Target(layer, ordinal);
      *wanted = *wanted || target != nullptr;
      if (!segments.empty()) {
        Segment& last = segments.back();
        const bool adjacent = target != nullptr
                                  ? last.target != nullptr && last.target + last.bytes == target
                                  : last.target == nullptr;
        if (adjacent) {
          last.bytes += bytes;
          continue;
        }
      }
      segments.push_back({target, bytes});
    }
  }
  return segments;
}

absl::Status IncomingTransfer::ReceiveSegments(KvConnection* connection,
                                               std::vector<Segment> segments,
                                               MutableBytes scratch) {
  size_t current = 0;
  bool discard_all = false;
  while (current < segments.size()) {
    size_t received = 0;
    {
      absl::MutexLock lock(&mutex_);
      if (!discard_all && !WritableBy(connection)) {
        discard_all = true;  // cancelled in the middle of the frame
        for (Segment& segment : segments) segment.target = nullptr;
      }
      std::array<MutableBytes, 64> into;
      size_t count = 0;
      size_t total = 0;
      for (size_t i = current; i < segments.size() && count < into.size() && total < kMaxReadBytes;
           ++i) {
        const Segment& segment = segments[i];
        if (segment.target == nullptr) {
          if (count == 0) into[count++] = scratch.first(std::min(scratch.size(), segment.bytes));
          break;
        }
        const size_t n = std::min(segment.bytes, kMaxReadBytes - total);
        into[count++] = MutableBytes(segment.target, n);
        total += n;
        if (n < segment.bytes) break;
      }
      TANDEM_ASSIGN_OR_RETURN(received, connection->ReceiveSome({into.data(), count}));
    }
    if (received == 0) {
      TANDEM_RETURN_IF_ERROR(connection->WaitReadable(context_->options->io_timeout));
    }
    while (received > 0) {
      Segment& segment = segments[current];
      const size_t n = std::min(received, segment.bytes);
      segment.bytes -= n;
      if (segment.target != nullptr) segment.target += n;
      received -= n;
      if (segment.bytes == 0) ++current;
    }
  }
  return absl::OkStatus();
}

void IncomingTransfer::CountArrived(KvConnection* connection, const FrameHeader& header) {
  const size_t bytes = context_->options->region.layout.BlockLayerBytes();
  for (uint32_t l = 0; l < header.layer_count; ++l) {
    for (uint32_t i = 0; i < header.ordinal_count; ++i) {
      const uint32_t layer = header.layer_begin + l;
      const uint32_t ordinal = header.ordinal_begin + i;
      // One piece per lock: the pool may not be read after a Cancel() either.
      absl::MutexLock lock(&mutex_);
      if (!WritableBy(connection)) return;
      if (arrived_[Bit(layer, ordinal)]) continue;
      digests_[ordinal] ^= BlockLayerDigest({Target(layer, ordinal), bytes}, layer);
      arrived_[Bit(layer, ordinal)] = true;
      --missing_;
      stats_.bytes += bytes;
      context_->counters->bytes += bytes;
      stats_.last_byte = Clock::Real()->Now();
    }
  }
}

absl::StatusOr<IncomingTransfer::Receipt> IncomingTransfer::ReceiveData(KvConnection* connection,
                                                                        const FrameHeader& header,
                                                                        MutableBytes scratch) {
  TANDEM_RETURN_IF_ERROR(CheckDataHeader(header));
  std::vector<Segment> segments;
  bool writable = false;
  bool wanted = false;
  bool over = false;
  {
    absl::MutexLock lock(&mutex_);
    writable = WritableBy(connection);
    over = bound_ == connection && (state_ == State::kSealed || state_ == State::kFailed);
    if (writable) {
      segments = PlanSegments(header, &wanted);
      if (stats_.bytes == 0) stats_.first_byte = Clock::Real()->Now();
    } else {
      segments.push_back({nullptr, header.payload_bytes});
    }
  }
  if (header.payload_bytes > 0) {
    TANDEM_RETURN_IF_ERROR(ReceiveSegments(connection, std::move(segments), scratch));
  }
  if (!writable) {
    // After its RESULT the sender needs no further answer: a duplicate, not a disagreement.
    ++context_->counters->late_frames;
    return over ? Receipt::kTaken : Receipt::kLate;
  }
  if (!wanted) {
    ++context_->counters->duplicate_frames;
    return Receipt::kTaken;
  }
  CountArrived(connection, header);
  SealOrFail(connection);
  return Receipt::kTaken;
}

absl::StatusOr<IncomingTransfer::Receipt> IncomingTransfer::Finish(KvConnection* connection,
                                                                   std::vector<uint64_t> digests) {
  {
    absl::MutexLock lock(&mutex_);
    if (!WritableBy(connection)) {
      ++context_->counters->late_frames;
      const bool over = bound_ == connection && state_ != State::kCancelled;
      return over ? Receipt::kTaken : Receipt::kLate;
    }
    if (finished_) {
      ++context_->counters->duplicate_frames;
      return Receipt::kTaken;
    }
    if (digests.size() != blocks_.size()) {
      return InvalidArgument("FINISH with {} digests for {} blocks", digests.size(),
                             blocks_.size());
    }
    finished_ = true;
    expected_digests_ = std::move(digests);
    deadline_ = Clock::Real()->Now() + context_->options->incomplete_timeout;
    if (blocks_.empty()) stats_.first_byte = stats_.last_byte = Clock::Real()->Now();
  }
  SealOrFail(connection);
  return Receipt::kTaken;
}

void IncomingTransfer::SealOrFail(KvConnection* connection) {
  absl::Status outcome;
  {
    absl::MutexLock lock(&mutex_);
    if (!WritableBy(connection) || !CompleteLocked()) return;
    for (size_t i = 0; i < digests_.size(); ++i) {
      if (digests_[i] == expected_digests_[i]) continue;
      outcome =
          DataLoss("transfer {}: block {} (ordinal {}) does not have the digest it was sent with",
                   key_.ToString(), blocks_[i], i);
      break;
    }
  }
  Settle(outcome, KvFailure::kDigestMismatch);
}

void IncomingTransfer::SenderQuiet(KvConnection* connection, const absl::Status& reason) {
  {
    absl::MutexLock lock(&mutex_);
    if (bound_ != connection) return;
  }
  Settle(Aborted("sender gave up: {}", std::string(reason.message())), KvFailure::kPeerAborted);
}

void IncomingTransfer::ConnectionLost(KvConnection* connection, const absl::Status& reason) {
  {
    absl::MutexLock lock(&mutex_);
    if (bound_ != connection) return;
  }
  Settle(Unavailable("channel lost: {}", std::string(reason.message())), KvFailure::kChannelLost);
}

void IncomingTransfer::Close() { Settle(Cancelled("receiver is closing"), KvFailure::kCancelled); }

void IncomingTransfer::Settle(const absl::Status& outcome, KvFailure reason) {
  TransferStats stats;
  std::shared_ptr<KvConnection> connection;
  bool cancelled = false;
  {
    absl::MutexLock lock(&mutex_);
    if (state_ == State::kSealed || state_ == State::kFailed) return;
    cancelled = state_ == State::kCancelled;
    if (!cancelled) {
      state_ = outcome.ok() ? State::kSealed : State::kFailed;
      notifying_ = std::this_thread::get_id();
      stats = stats_;
      connection = connection_;
    }
  }
  if (cancelled) {
    BecomeQuiet();
    return;
  }
  // Nothing writes to it from here on. Before the callbacks, so that a worker that has heard of the
  // end may name the blocks again at once.
  context_->table->Release(*this);
  const KvReceiverOptions& options = *context_->options;
  if (outcome.ok()) {
    ++context_->counters->transfers;
    if (options.on_sealed) options.on_sealed(key_.id, key_.epoch, stats);
  } else {
    context_->counters->CountFailure(reason);
    spdlog::warn("kv transfer {} failed: {}", key_.ToString(), std::string(outcome.message()));
    if (options.on_failed) options.on_failed(key_.id, key_.epoch, outcome);
  }
  {
    absl::MutexLock lock(&mutex_);
    notifying_ = std::thread::id();
  }
  BecomeQuiet();
  const bool sender_waits =
      outcome.ok() || reason == KvFailure::kDigestMismatch || reason == KvFailure::kIncomplete;
  if (connection != nullptr && sender_waits) {
    // A failure here is a dead connection, which its reading thread notices by itself.
    (void)SendStatus(connection.get(), FrameType::kResult, key_, outcome, kReplyTimeout);
  }
}

void IncomingTransfer::BecomeQuiet() {
  {
    absl::MutexLock lock(&mutex_);
    if (quiet_) return;
    quiet_ = true;
    deadline_ = absl::InfiniteFuture();
    abort_due_ = false;
    // It may be remembered for long: keep neither the socket nor the bookkeeping.
    connection_ = nullptr;
    arrived_ = {};
    digests_ = {};
    expected_digests_ = {};
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
  state_ = State::kCancelled;
  context_->counters->CountFailure(KvFailure::kCancelled);
  abort_due_ = connection_ != nullptr;
  deadline_ =
      Clock::Real()->Now() + (connection_ != nullptr ? context_->options->quiet_timeout
                                                     : context_->options->no_sender_timeout);
}

absl::Time IncomingTransfer::Tick(absl::Time now) {
  std::shared_ptr<KvConnection> connection;
  bool abort_due = false;
  bool overdue = false;
  bool cancelled = false;
  absl::Time next;
  {
    absl::MutexLock lock(&mutex_);
    connection = connection_;
    abort_due = std::exchange(abort_due_, false);
    overdue = now >= deadline_;
    if (overdue) deadline_ = absl::InfiniteFuture();
    cancelled = state_ == State::kCancelled;
    if (overdue && cancelled && connection == nullptr) expired_ = true;
    next = deadline_;
  }
  if (abort_due) {
    (void)SendStatus(connection.get(), FrameType::kAbort, key_,
                     Cancelled("cancelled by the receiver"), kReplyTimeout);
  }
  if (!overdue) return next;
  if (!cancelled) {
    Settle(DataLoss("transfer {}: the sender finished, but pieces never arrived", key_.ToString()),
           KvFailure::kIncomplete);
  } else if (connection == nullptr) {
    BecomeQuiet();
  } else {
    spdlog::warn("kv transfer {}: {} does not answer the abort; closing its channel",
                 key_.ToString(), connection->peer());
    connection->Shutdown();  // its reading thread ends and reports the connection lost
  }
  return absl::InfiniteFuture();
}

}  // namespace tandem::kvtransfer
