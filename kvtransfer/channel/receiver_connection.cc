#include "kvtransfer/channel/receiver_connection.h"

#include <algorithm>
#include <cstring>

#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/link_probe.h"

namespace tandem::kvtransfer {
namespace {

constexpr size_t kScratchBytes = 256 << 10;
constexpr absl::Duration kReplyTimeout = absl::Seconds(2);

TransferKey KeyOf(const FrameHeader& header) { return {header.id, header.epoch}; }

}  // namespace

ReceiverConnection::ReceiverConnection(std::shared_ptr<KvConnection> connection,
                                       const ReceiverContext* context, const Hello* here,
                                       std::function<void()> on_change)
    : connection_(std::move(connection)),
      context_(context),
      here_(here),
      on_change_(std::move(on_change)),
      accepted_(Clock::Real()->Now()) {}

void ReceiverConnection::Run() {
  const absl::Status end = Serve();
  connection_->Shutdown();
  const std::string who = peer_worker_.empty() ? connection_->peer() : peer_worker_;
  size_t cut_off = 0;
  for (const auto& [key, transfer] : opened_) {
    if (!transfer->quiet()) ++cut_off;
    transfer->ConnectionLost(connection_.get(), end);
  }
  if (cut_off > 0 || !absl::IsUnavailable(end)) {
    spdlog::warn("kv channel from {} ended with {} transfers under way: {}", who, cut_off,
                 std::string(end.message()));
  } else {
    spdlog::info("kv channel from {} ended", who);
  }
  opened_.clear();
  finished_ = true;
  on_change_();
}

absl::Duration ReceiverConnection::Patience() const {
  if (authenticated_) return absl::InfiniteDuration();
  return accepted_ + context_->options->auth_timeout - Clock::Real()->Now();
}

absl::Status ReceiverConnection::Serve() {
  absl::Status status = Handshake();
  if (!status.ok()) {
    ++context_->counters->refused_channels;
    return status;
  }
  ++context_->counters->channels_opened;
  spdlog::info("kv channel from {} ({}) open", peer_worker_, connection_->peer());
  scratch_.resize(kScratchBytes);
  while (true) {
    absl::StatusOr<FrameHeader> header = connection_->ReceiveHeader(Patience());
    if (absl::IsDeadlineExceeded(header.status())) {
      ++context_->counters->auth_failures;
      return absl::UnauthenticatedError("no token was presented in time");
    }
    if (!header.ok()) return header.status();
    TANDEM_RETURN_IF_ERROR(HandleFrame(*header));
  }
}

absl::Status ReceiverConnection::Handshake() {
  const auto refuse = [this](const absl::Status& why) {
    (void)SendStatus(connection_.get(), FrameType::kRefuse, {}, why, kReplyTimeout);
    return why;
  };
  const absl::StatusOr<FrameHeader> header = connection_->ReceiveHeader(Patience());
  if (absl::IsFailedPrecondition(header.status())) return refuse(header.status());
  if (!header.ok()) return header.status();
  if (header->type != FrameType::kHello) {
    return InvalidArgument("expected HELLO, got {}", FrameTypeName(header->type));
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string payload,
                          ReceiveControl(connection_.get(), *header, Patience()));
  const absl::StatusOr<Hello> peer = DecodeHello(std::as_bytes(std::span(payload)));
  if (!peer.ok()) return refuse(peer.status());
  if (absl::Status status = CheckCompatible(*here_, *peer); !status.ok()) return refuse(status);
  peer_worker_ = peer->worker_id;
  FrameHeader reply;
  reply.type = FrameType::kHelloOk;
  return SendControl(connection_.get(), reply, EncodeHello(*here_), kReplyTimeout);
}

absl::Status ReceiverConnection::HandleFrame(const FrameHeader& header) {
  switch (header.type) {
    case FrameType::kProbe:
    case FrameType::kProbeEnd:
      return HandleProbe(header);
    case FrameType::kOpen:
      return HandleOpen(header);
    case FrameType::kData:
      return HandleData(header);
    case FrameType::kFinish:
      return HandleFinish(header);
    case FrameType::kQuiet:
      return HandleQuiet(header);
    case FrameType::kHello:  // repeated
      return Discard(header.payload_bytes);
    default:
      return InvalidArgument("a sender may not send {}", FrameTypeName(header.type));
  }
}

absl::Status ReceiverConnection::HandleProbe(const FrameHeader& header) {
  if (header.type == FrameType::kProbeEnd) {
    FrameHeader reply;
    reply.type = FrameType::kProbeAck;
    return SendControl(connection_.get(), reply, "", kReplyTimeout);
  }
  probed_bytes_ += header.payload_bytes;
  // Twice the protocol's burst: a repeated frame is harmless, an endless probe is not.
  if (probed_bytes_ > 2 * kProbeBurstBytes) return InvalidArgument("link probe is too long");
  return Discard(header.payload_bytes);
}

absl::Status ReceiverConnection::Discard(size_t bytes) {
  while (bytes > 0) {
    const size_t n = std::min(bytes, scratch_.size());
    TANDEM_RETURN_IF_ERROR(ReceiveAll(connection_.get(), MutableBytes(scratch_).first(n),
                                      authenticated_ ? context_->options->io_timeout : Patience()));
    bytes -= n;
  }
  return absl::OkStatus();
}

absl::Status ReceiverConnection::AnswerAbort(const TransferKey& key, const absl::Status& why) {
  return SendStatus(connection_.get(), FrameType::kAbort, key, why, kReplyTimeout);
}

absl::Status ReceiverConnection::RequireAuthenticated(const FrameHeader& header) {
  if (authenticated_) return absl::OkStatus();
  ++context_->counters->auth_failures;
  return absl::UnauthenticatedError(fmt::format("{} before any token", FrameTypeName(header.type)));
}

absl::Status ReceiverConnection::HandleOpen(const FrameHeader& header) {
  if (header.payload_bytes != kKvTokenBytes) {
    return InvalidArgument("OPEN with a token of {} bytes", header.payload_bytes);
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string token, ReceiveControl(connection_.get(), header,
                                                                  context_->options->auth_timeout));
  const TransferKey key = KeyOf(header);
  const std::shared_ptr<IncomingTransfer> transfer = context_->table->Find(key);
  if (transfer == nullptr) {
    return AnswerAbort(key, NotFound("the receiver does not expect this transfer"));
  }
  if (!transfer->TokenMatches(token)) {
    ++context_->counters->auth_failures;
    return absl::UnauthenticatedError(fmt::format("wrong token for transfer {}", key.ToString()));
  }
  authenticated_ = true;
  const absl::Status opened = transfer->Open(connection_, header.ordinal_count);
  ForgetQuietTransfers();
  opened_.emplace(key, transfer);
  on_change_();
  return opened.ok() ? absl::OkStatus() : AnswerAbort(key, opened);
}

void ReceiverConnection::ForgetQuietTransfers() {
  if (opened_.size() < forget_at_) return;
  absl::erase_if(opened_, [](const auto& entry) { return entry.second->quiet(); });
  forget_at_ = 2 * opened_.size() + 64;
}

absl::Status ReceiverConnection::HandleData(const FrameHeader& header) {
  TANDEM_RETURN_IF_ERROR(RequireAuthenticated(header));
  const TransferKey key = KeyOf(header);
  const std::shared_ptr<IncomingTransfer> transfer = context_->table->Find(key);
  if (transfer == nullptr) {
    ++context_->counters->late_frames;
    TANDEM_RETURN_IF_ERROR(Discard(header.payload_bytes));
    return AnswerAbort(key, NotFound("the receiver does not expect this transfer"));
  }
  TANDEM_ASSIGN_OR_RETURN(const IncomingTransfer::Receipt receipt,
                          transfer->ReceiveData(connection_.get(), header, MutableBytes(scratch_)));
  if (receipt == IncomingTransfer::Receipt::kTaken) return absl::OkStatus();
  return AnswerAbort(key, Cancelled("transfer is not open at the receiver"));
}

absl::Status ReceiverConnection::HandleFinish(const FrameHeader& header) {
  TANDEM_RETURN_IF_ERROR(RequireAuthenticated(header));
  const TransferKey key = KeyOf(header);
  const std::shared_ptr<IncomingTransfer> transfer = context_->table->Find(key);
  // Bounded by the receiver's own expectation before anything is allocated for it.
  if (transfer == nullptr) {
    ++context_->counters->late_frames;
    TANDEM_RETURN_IF_ERROR(Discard(header.payload_bytes));
    return AnswerAbort(key, NotFound("the receiver does not expect this transfer"));
  }
  if (header.payload_bytes != transfer->blocks().size() * sizeof(uint64_t)) {
    return InvalidArgument("FINISH of {} bytes for {} blocks", header.payload_bytes,
                           transfer->blocks().size());
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string payload,
                          ReceiveControl(connection_.get(), header, context_->options->io_timeout));
  std::vector<uint64_t> digests(transfer->blocks().size());
  if (!payload.empty()) std::memcpy(digests.data(), payload.data(), payload.size());
  TANDEM_ASSIGN_OR_RETURN(const IncomingTransfer::Receipt receipt,
                          transfer->Finish(connection_.get(), std::move(digests)));
  on_change_();
  if (receipt == IncomingTransfer::Receipt::kTaken) return absl::OkStatus();
  return AnswerAbort(key, Cancelled("transfer is not open at the receiver"));
}

absl::Status ReceiverConnection::HandleQuiet(const FrameHeader& header) {
  TANDEM_RETURN_IF_ERROR(RequireAuthenticated(header));
  TANDEM_ASSIGN_OR_RETURN(const std::string message,
                          ReceiveControl(connection_.get(), header, context_->options->io_timeout));
  if (const auto transfer = context_->table->Find(KeyOf(header)); transfer != nullptr) {
    transfer->SenderQuiet(connection_.get(), StatusOfFrame(header, message));
  }
  return absl::OkStatus();
}

}  // namespace tandem::kvtransfer
