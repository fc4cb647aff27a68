// SenderPeer's connection: making it, listening to it, losing it.
#include <vector>

#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/link_probe.h"
#include "kvtransfer/channel/sender_peer.h"

namespace tandem::kvtransfer {

absl::Status SenderPeer::EnsureConnected() {
  if (wire_ != nullptr) return absl::OkStatus();
  const KvSenderOptions& options = *context_->options;
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<KvConnection> dialed,
                          context_->transport->Dial(address_, options.connect_timeout));
  std::shared_ptr<KvConnection> connection(std::move(dialed));
  {
    absl::MutexLock lock(&mutex_);
    if (stopping_) return Cancelled("sender is closing");
    connection_ = connection;  // from here on the destructor can end a wait
  }
  absl::Status status = Handshake(connection.get());
  if (!status.ok()) {
    connection->Shutdown();
    absl::MutexLock lock(&mutex_);
    connection_ = nullptr;
    return status;
  }
  wire_ = std::move(connection);
  ++generation_;
  ++context_->counters->channels_opened;
  reader_ =
      std::thread([this, wire = wire_, generation = generation_] { ReaderLoop(wire, generation); });
  return absl::OkStatus();
}

absl::Status SenderPeer::Handshake(KvConnection* connection) {
  const KvSenderOptions& options = *context_->options;
  const Hello here = {options.worker_id, options.capability_digest, options.region.layout,
                      options.region.num_blocks};
  FrameHeader hello;
  hello.type = FrameType::kHello;
  TANDEM_RETURN_IF_ERROR(
      SendControl(connection, hello, EncodeHello(here), options.connect_timeout));
  TANDEM_ASSIGN_OR_RETURN(const FrameHeader reply,
                          connection->ReceiveHeader(options.connect_timeout));
  if (reply.type != FrameType::kHelloOk && reply.type != FrameType::kRefuse) {
    return InvalidArgument("expected HELLO_OK, got {}", FrameTypeName(reply.type));
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string payload,
                          ReceiveControl(connection, reply, options.connect_timeout));
  if (reply.type == FrameType::kRefuse) {
    ++context_->counters->refused_channels;
    return FailedPrecondition("{} refused the channel: {}", address_, payload);
  }
  TANDEM_ASSIGN_OR_RETURN(const Hello peer, DecodeHello(std::as_bytes(std::span(payload))));
  TANDEM_RETURN_IF_ERROR(CheckCompatible(here, peer));
  if (!worker_id_.empty() && peer.worker_id != worker_id_) {
    return FailedPrecondition("{} is worker {}, not {}", address_, peer.worker_id, worker_id_);
  }
  peer_num_blocks_ = peer.num_blocks;
  TANDEM_ASSIGN_OR_RETURN(const double rate, ProbeLink(connection, options.connect_timeout));
  spdlog::info("kv link to {}: {} {:.0f} MB/s", peer.worker_id, context_->transport->name(),
               rate / 1e6);
  if (rate < options.slow_link_bytes_per_second) {
    spdlog::warn("kv link to {} is slow: {:.0f} MB/s, expected at least {:.0f} MB/s",
                 peer.worker_id, rate / 1e6, options.slow_link_bytes_per_second / 1e6);
  }
  absl::MutexLock lock(&mutex_);
  presented_id_ = peer.worker_id;
  rate_ = rate;
  return absl::OkStatus();
}

void SenderPeer::ReaderLoop(std::shared_ptr<KvConnection> connection, uint64_t generation) {
  absl::Status status;
  while (status.ok()) status = ReadReply(connection.get());
  connection->Shutdown();  // a writer that waits for this peer stops waiting
  absl::MutexLock lock(&mutex_);
  events_.push_back(LostEvent{generation, status});
}

absl::Status SenderPeer::ReadReply(KvConnection* connection) {
  TANDEM_ASSIGN_OR_RETURN(const FrameHeader header,
                          connection->ReceiveHeader(absl::InfiniteDuration()));
  TANDEM_ASSIGN_OR_RETURN(
      const std::string message,
      header.payload_bytes <= kMaxControlPayload
          ? ReceiveControl(connection, header, context_->options->io_timeout)
          : absl::StatusOr<std::string>(InvalidArgument(
                "{} frame of {} bytes", FrameTypeName(header.type), header.payload_bytes)));
  switch (header.type) {
    case FrameType::kResult:
    case FrameType::kAbort: {
      absl::MutexLock lock(&mutex_);
      events_.push_back(PeerEvent{header.type, TransferKey{header.id, header.epoch},
                                  StatusOfFrame(header, message)});
      return absl::OkStatus();
    }
    case FrameType::kHelloOk:  // repeated
    case FrameType::kProbeAck:
      return absl::OkStatus();
    default:
      return InvalidArgument("a receiver may not send {}", FrameTypeName(header.type));
  }
}

void SenderPeer::LoseConnection(absl::Status status) {
  CloseConnection();
  {
    // Where the reader saw more than an end, that is the cause.
    absl::MutexLock lock(&mutex_);
    for (const Event& event : events_) {
      const auto* lost = std::get_if<LostEvent>(&event);
      if (lost != nullptr && lost->generation == generation_ &&
          !absl::IsUnavailable(lost->status)) {
        status = lost->status;
      }
    }
  }
  spdlog::warn("kv link to {} ({}) lost with {} transfers under way: {}", worker_id_, address_,
               transfers_.size(), std::string(status.message()));
  // Transfers whose OPEN is still queued go out on the next connection.
  FailAll(Unavailable("kv link to {} lost: {}", address_, std::string(status.message())),
          KvFailure::kChannelLost);
}

void SenderPeer::CloseConnection() {
  if (wire_ == nullptr) return;
  wire_->Shutdown();
  reader_.join();
  absl::MutexLock lock(&mutex_);
  connection_ = nullptr;
  wire_ = nullptr;
}

}  // namespace tandem::kvtransfer
