#include "kvtransfer/channel/sender_link.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/link_proof.h"
#include "kvtransfer/channel/link_self_test.h"

namespace tandem::kvtransfer {
namespace {

constexpr size_t kMaxNote = 250;

// As the router takes texts.
std::string OneLine(std::string_view text) {
  std::string line(text.substr(0, kMaxNote));
  std::replace_if(line.begin(), line.end(), absl::ascii_iscntrl, ' ');
  return line;
}

std::string Gigabytes(double rate) {
  return rate > 0 ? fmt::format("{:.2f}", rate / 1e9) : std::string("-");
}

std::string DescribeTest(const KvLinkTest& test) {
  return fmt::format("{} / {} / {} GB/s at 64 KB / 1 MB / {} MB, {:.0f} us there and back",
                     Gigabytes(test.small_rate), Gigabytes(test.medium_rate),
                     Gigabytes(test.large_rate), test.large_bytes >> 20,
                     test.latency_seconds * 1e6);
}

}  // namespace

absl::StatusOr<std::unique_ptr<SenderLink>> SenderLink::Connect(
    const LinkContext& context, const PeerAddress& peer,
    absl::FunctionRef<bool(std::shared_ptr<KvConnection>)> on_dialed,
    std::optional<KvLink>* refused) {
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<KvConnection> dialed,
                          context.network->Dial(peer.address, context.options->connect_timeout));
  std::unique_ptr<SenderLink> link(new SenderLink(context, std::move(dialed)));
  if (!on_dialed(link->connection_)) return Cancelled("sender is closing");
  TANDEM_RETURN_IF_ERROR(link->ShakeHands(peer));
  absl::Status status = link->SelectTransport(peer.transports);
  if (status.ok()) status = link->CheckFloor();
  // No transport, a wrong byte, too slow: not what the next moment may mend.
  if (absl::IsDataLoss(status) || absl::IsFailedPrecondition(status)) {
    link->found_.refused = true;
    link->found_.note = OneLine(MessageOf(status));
    *refused = link->found_;
    ++context.counters->refused_connections;
  }
  TANDEM_RETURN_IF_ERROR(status);
  const KvLink& found = link->found_;
  spdlog::info("kv link to {}: {}, {}", link->peer_.worker_id, found.transport,
               DescribeTest(found.test));
  if (found.test.rate() > 0) link->NoteRate(found.test.rate());
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
    const std::string& name = own.transport->name();
    const auto names = [&](const TransportOffer& offer) { return offer.name == name; };
    const auto it = std::find_if(peer_.transports.begin(), peer_.transports.end(), names);
    if (it == peer_.transports.end() ||
        std::find(wanted.begin(), wanted.end(), own.transport) == wanted.end()) {
      NoteUnused(own, "not offered");
      continue;
    }
    last = TryTransport(own, it->advert);
    if (last.ok()) {
      if (!first) ++context_.counters->transport_fallbacks;
      return absl::OkStatus();
    }
    first = false;
    spdlog::warn("kv transport {} to {} does not work, trying the next: {}", name, peer_.worker_id,
                 MessageOf(last));
    NoteUnused(own, MessageOf(last));
  }
  return last;
}

absl::Status SenderLink::TryTransport(const RegisteredTransport& own, const std::string& advert) {
  const KvSenderOptions& options = *context_.options;
  const std::string& name = own.transport->name();
  found_.transport = name;
  TANDEM_ASSIGN_OR_RETURN(
      std::unique_ptr<KvWriter> writer,
      own.registration->Connect(connection_.get(), advert, peer_.shape,
                                [&](const std::string& note) { return Select(name, note); }));
  absl::StatusOr<KvLinkTest> test =
      TestLink(connection_.get(), writer.get(),
               {.time = options.link_test_time, .io_timeout = options.io_timeout});
  if (!test.ok()) {
    writer->Detach();
    return absl::Status(
        test.status().code(),
        fmt::format("the link from {} to {} over {} fails its self-test: {}", options.worker_id,
                    peer_.worker_id, name, MessageOf(test.status())));
  }
  writer_ = std::move(writer);
  transport_ = own.transport;
  found_.test = *test;
  const double limit = options.slow_link_bytes_per_second;
  found_.least_bytes_per_second =
      limit >= 0 ? limit : transport_->capabilities().expected_bytes_per_second;
  return absl::OkStatus();
}

absl::Status SenderLink::CheckFloor() {
  const KvSenderOptions& options = *context_.options;
  const double best = found_.test.best_rate();
  if (best <= 0 || best >= options.min_link_bytes_per_second) return absl::OkStatus();
  const std::string text = fmt::format(
      "the link from {} to {} over {} reaches {:.3f} GB/s, less than the {:.3f} of "
      "--min-kv-link-gbps",
      options.worker_id, peer_.worker_id, transport_->name(), best / 1e9,
      options.min_link_bytes_per_second / 1e9);
  found_.slow = true;
  ++context_.counters->slow_links;
  if (options.refuse_slow_links) return FailedPrecondition("{}", text);
  spdlog::warn("{}", text);
  return absl::OkStatus();
}

void SenderLink::NoteUnused(const RegisteredTransport& own, std::string_view why) {
  found_.note = OneLine(fmt::format("{}{}{}: {}", found_.note, found_.note.empty() ? "" : "; ",
                                    own.transport->name(), why));
}

absl::Status SenderLink::Select(const std::string& name, const std::string& note) {
  const absl::Duration timeout = context_.options->connect_timeout;
  FrameHeader select;
  select.type = FrameType::kSelect;
  TANDEM_RETURN_IF_ERROR(
      SendControl(connection_.get(), select, note.empty() ? name : name + " " + note, timeout));
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

void SenderLink::NoteRate(double bytes_per_second) {
  found_.bytes_per_second = bytes_per_second;
  if (found_.slow || bytes_per_second >= found_.least_bytes_per_second) return;
  found_.slow = true;
  ++context_.counters->slow_links;
  spdlog::warn("kv link to {} over {} is slow: {:.0f} MB/s, expected at least {:.0f} MB/s",
               peer_.worker_id, transport_->name(), bytes_per_second / 1e6,
               found_.least_bytes_per_second / 1e6);
}

}  // namespace tandem::kvtransfer
