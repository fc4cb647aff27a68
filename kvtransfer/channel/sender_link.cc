#include "kvtransfer/channel/sender_link.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/link_proof.h"

namespace tandem::kvtransfer {

absl::StatusOr<std::unique_ptr<SenderLink>> SenderLink::Connect(
    const LinkContext& context, const PeerAddress& peer,
    absl::FunctionRef<bool(std::shared_ptr<KvConnection>)> on_dialed) {
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<KvConnection> dialed,
                          context.network->Dial(peer.address, context.options->connect_timeout));
  std::unique_ptr<SenderLink> link(new SenderLink(context, std::move(dialed)));
  if (!on_dialed(link->connection_)) return Cancelled("sender is closing");
  TANDEM_RETURN_IF_ERROR(link->ShakeHands(peer));
  TANDEM_RETURN_IF_ERROR(link->SelectTransport(peer.transports));
  TANDEM_ASSIGN_OR_RETURN(link->probed_rate_, link->writer_->Probe());
  spdlog::info("kv link to {}: {} {:.0f} MB/s", link->peer_.worker_id, link->transport_->name(),
               link->probed_rate_ / 1e6);
  link->NoteRate(link->probed_rate_);
  ++context.counters->connections_opened;
  return link;
}

SenderLink::~SenderLink() {
  connection_->Shutdown();
  if (writer_ != nullptr) writer_->Detach();
}

absl::Status SenderLink::ShakeHands(const PeerAddress& peer) {
  const KvSenderOptions& options = *context_.options;
  TANDEM_ASSIGN_OR_RETURN(
      const std::string proved,
      ProveToReceiver(connection_.get(), {options.cluster_secret, options.worker_id},
                      peer.worker_id, options.connect_timeout));
  Hello here = {options.worker_id, options.capability_digest, context_.store->shape(), {}};
  for (const RegisteredTransport& own : *context_.transports) {
    here.transports.push_back({own.transport->name(), ""});
  }
  FrameHeader hello;
  hello.type = FrameType::kHello;
  TANDEM_RETURN_IF_ERROR(
      SendControl(connection_.get(), hello, EncodeHello(here), options.connect_timeout));
  TANDEM_ASSIGN_OR_RETURN(const FrameHeader reply,
                          connection_->ReceiveHeader(options.connect_timeout));
  if (reply.type != FrameType::kHelloOk && reply.type != FrameType::kRefuse) {
    return InvalidArgument("expected HELLO_OK, got {}", FrameTypeName(reply.type));
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string payload,
                          ReceiveControl(connection_.get(), reply, options.connect_timeout));
  if (reply.type == FrameType::kRefuse) {
    ++context_.counters->refused_connections;
    return FailedPrecondition("{} refused the connection: {}", peer.address,
                              absl::CEscape(payload));
  }
  TANDEM_ASSIGN_OR_RETURN(peer_, DecodeHello(std::as_bytes(std::span(payload))));
  TANDEM_RETURN_IF_ERROR(CheckCompatible(/*receiver=*/peer_, /*sender=*/here));
  if (peer_.worker_id != proved) {
    return FailedPrecondition("{}: worker_id in HELLO_OK is not the one that was proved",
                              peer.address);
  }
  return absl::OkStatus();
}

absl::Status SenderLink::SelectTransport(const std::string& offered) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<KvTransport*> wanted, ParseTransports(offered));
  absl::Status last = FailedPrecondition("{} offers no KV transport that {} uses", peer_.worker_id,
                                         context_.options->worker_id);
  bool first = true;
  for (const RegisteredTransport& own : *context_.transports) {
    if (std::find(wanted.begin(), wanted.end(), own.transport) == wanted.end()) continue;
    const std::string& name = own.transport->name();
    const auto names = [&](const TransportOffer& offer) { return offer.name == name; };
    const auto it = std::find_if(peer_.transports.begin(), peer_.transports.end(), names);
    if (it == peer_.transports.end()) continue;
    auto writer = own.registration->Connect(connection_.get(), it->advert, peer_.shape,
                                            [&] { return Select(name); });
    if (writer.ok()) {
      writer_ = *std::move(writer);
      transport_ = own.transport;
      if (!first) ++context_.counters->transport_fallbacks;
      return absl::OkStatus();
    }
    last = writer.status();
    first = false;
    spdlog::warn("kv transport {} to {} does not work, trying the next: {}", name, peer_.worker_id,
                 MessageOf(last));
  }
  return last;
}

absl::Status SenderLink::Select(const std::string& name) {
  const absl::Duration timeout = context_.options->connect_timeout;
  FrameHeader select;
  select.type = FrameType::kSelect;
  TANDEM_RETURN_IF_ERROR(SendControl(connection_.get(), select, name, timeout));
  // Replies of the handshake that a bad network repeats come before it.
  while (true) {
    TANDEM_ASSIGN_OR_RETURN(const FrameHeader reply, connection_->ReceiveHeader(timeout));
    TANDEM_ASSIGN_OR_RETURN(const std::string message,
                            ReceiveControl(connection_.get(), reply, timeout));
    if (reply.type == FrameType::kSelected) return StatusOfFrame(reply, message);
    if (reply.type != FrameType::kHelloOk) {
      return InvalidArgument("expected SELECTED, got {}", FrameTypeName(reply.type));
    }
  }
}

double SenderLink::expected_rate() const {
  const double limit = context_.options->slow_link_bytes_per_second;
  return limit >= 0 ? limit : transport_->capabilities().expected_bytes_per_second;
}

bool SenderLink::NoteRate(double rate) {
  if (found_slow_ || rate >= expected_rate()) return false;
  found_slow_ = true;
  ++context_.counters->slow_links;
  spdlog::warn("kv link to {} over {} is slow: {:.0f} MB/s, expected at least {:.0f} MB/s",
               peer_.worker_id, transport_->name(), rate / 1e6, expected_rate() / 1e6);
  return true;
}

}  // namespace tandem::kvtransfer
