#include "kvtransfer/channel/receiver_link.h"

#include <algorithm>
#include <cstring>
#include <pthread.h>
#include <thread>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_split.h"
#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/log_limiter.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/frame_reception.h"
#include "kvtransfer/channel/link_proof.h"
#include "kvtransfer/channel/link_self_test.h"

namespace tandem::kvtransfer {
namespace {

constexpr size_t kScratchBytes = 256 << 10;
// Frames before the first token that lead nowhere: a repeated HELLO, OPEN of a transfer that was
// cancelled meanwhile.
constexpr int kMaxStrayFrames = 64;
// To be woken takes about as long as a one-sided writer takes for a frame's bytes, so the reader
// does not go to sleep in between: a block seals a tenth sooner. Whoever else wants the processor
// gets it meanwhile.
constexpr absl::Duration kAwake = absl::Microseconds(200);

// What strangers can have logged, all of them together.
LogLimiter& StrangerLines() {
  static auto* limiter = new LogLimiter;
  return *limiter;
}

TransferKey KeyOf(const FrameHeader& header) { return {header.id, header.epoch}; }

}  // namespace

ReceiverLink::ReceiverLink(std::shared_ptr<KvConnection> connection, const ReceiverContext* context,
                           const Hello* here, std::span<const RegisteredTransport> transports,
                           std::function<void()> on_change)
    : connection_(std::move(connection)),
      context_(context),
      here_(here),
      transports_(transports),
      on_change_(std::move(on_change)),
      accepted_(Clock::Real()->Now()) {}

void ReceiverLink::Run() {
  pthread_setname_np(pthread_self(), "tandem-kv-recv");
  const absl::Status end = Serve();
  connection_->Shutdown();
  if (bound_.reader != nullptr) bound_.reader->Stop();
  if (!proved_) {
    if (StrangerLines().Allow()) {
      spdlog::warn("kv connection from {} refused: {}{}", connection_->peer(), MessageOf(end),
                   StrangerLines().Withheld());
    }
    finished_ = true;
    on_change_();
    return;
  }
  const std::string who = absl::CEscape(peer_worker_);
  size_t cut_off = 0;
  for (const auto& [key, transfer] : opened_) {
    if (!transfer->quiet()) ++cut_off;
    transfer->ConnectionLost(connection_.get(), end);
  }
  if (cut_off > 0 || !absl::IsUnavailable(end)) {
    spdlog::warn("kv connection from {} ended with {} transfers under way: {}", who, cut_off,
                 MessageOf(end));
  } else {
    spdlog::info("kv connection from {} ended", who);
  }
  opened_.clear();
  finished_ = true;
  on_change_();
}

absl::Time ReceiverLink::deadline() const {
  if (authenticated_) return absl::InfiniteFuture();
  const absl::Duration limit = context_->options->auth_timeout;
  return accepted_ + (proved_ ? 2 * limit : limit);
}

absl::Duration ReceiverLink::Patience() const { return deadline() - Clock::Real()->Now(); }

absl::Status ReceiverLink::Serve() {
  absl::Status status = Greet();
  if (!status.ok()) {
    ++context_->counters->refused_connections;
    return status;
  }
  ++context_->counters->connections_opened;
  spdlog::info("kv connection from {} ({}) open", absl::CEscape(peer_worker_), connection_->peer());
  scratch_.resize(kScratchBytes);
  while (true) {
    LookForFrame();
    absl::StatusOr<FrameHeader> header = connection_->ReceiveHeader(Patience());
    if (absl::IsDeadlineExceeded(header.status()) || Patience() <= absl::ZeroDuration()) {
      ++context_->counters->auth_failures;
      return absl::UnauthenticatedError("no token was presented in time");
    }
    if (!header.ok()) return header.status();
    TANDEM_RETURN_IF_ERROR(HandleFrame(*header));
    data_is_due_ = (header->type == FrameType::kOpen || header->type == FrameType::kData) &&
                   bound_.transport->capabilities().one_sided;
  }
}

void ReceiverLink::LookForFrame() {
  if (!data_is_due_) return;
  const absl::Time until = Clock::Real()->Now() + kAwake;
  while (Clock::Real()->Now() < until && !connection_->WaitReadable(absl::ZeroDuration()).ok()) {
    std::this_thread::yield();
  }
}

absl::Status ReceiverLink::Greet() {
  const KvReceiverOptions& options = *context_->options;
  absl::StatusOr<std::string> sender =
      ProveToSender(connection_.get(), {options.cluster_secret, options.worker_id}, Patience());
  if (!sender.ok()) {
    ++context_->counters->auth_failures;
    return sender.status();
  }
  peer_worker_ = *std::move(sender);
  proved_ = true;
  return Handshake();
}

absl::Status ReceiverLink::Handshake() {
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
  if (peer->worker_id != peer_worker_) {
    return refuse(InvalidArgument("worker_id in HELLO is not the one that was proved"));
  }
  if (absl::Status status = CheckCompatible(*here_, *peer); !status.ok()) return refuse(status);
  Hello answer = *here_;
  answer.transports = MakeOffers(peer->transports);
  FrameHeader reply;
  reply.type = FrameType::kHelloOk;
  return SendControl(connection_.get(), reply, EncodeHello(answer), kReplyTimeout);
}

std::vector<TransportOffer> ReceiverLink::MakeOffers(const std::vector<TransportOffer>& wanted) {
  std::vector<TransportOffer> offers;
  for (const RegisteredTransport& offered : transports_) {
    const std::string& name = offered.transport->name();
    const auto names = [&](const TransportOffer& w) { return w.name == name; };
    if (std::none_of(wanted.begin(), wanted.end(), names)) continue;
    absl::StatusOr<std::unique_ptr<KvOffer>> offer = offered.registration->Offer();
    if (!offer.ok()) {
      spdlog::warn("kv transport {} cannot be offered to {}: {}", name, absl::CEscape(peer_worker_),
                   MessageOf(offer.status()));
      continue;
    }
    offers.push_back({name, (*offer)->advert()});
    offers_.push_back({offered.transport, *std::move(offer)});
  }
  return offers;
}

absl::Status ReceiverLink::HandleSelect(const FrameHeader& header) {
  TANDEM_ASSIGN_OR_RETURN(
      const std::string selected,
      ReceiveControl(connection_.get(), header, context_->options->auth_timeout));
  const std::pair<std::string, std::string> parts =
      absl::StrSplit(selected, absl::MaxSplits(' ', 1));
  const auto& [name, note] = parts;
  if (bound_.transport != nullptr && bound_.transport->name() == name) {
    return absl::OkStatus();  // repeated
  }
  if (authenticated_) return InvalidArgument("SELECT after a transfer was opened");
  const auto offered = [&](const PendingOffer& o) { return o.transport->name() == parts.first; };
  const auto it = std::find_if(offers_.begin(), offers_.end(), offered);
  absl::Status outcome;
  if (it == offers_.end()) {
    outcome = FailedPrecondition("transport '{}' was not offered",
                                 absl::CEscape(name.substr(0, kMaxTransportName)));
  } else if (absl::StatusOr<std::shared_ptr<KvReader>> reader =
                 it->offer->Accept(connection_.get(), note);
             reader.ok()) {
    bound_ = {connection_, *std::move(reader), it->transport};
    offers_.erase(it);
    spdlog::info("kv connection from {} ({}) over {}", absl::CEscape(peer_worker_),
                 connection_->peer(), name);
  } else {
    outcome = reader.status();
    spdlog::warn("kv transport with {}: {}", absl::CEscape(peer_worker_), MessageOf(outcome));
  }
  return SendStatus(connection_.get(), FrameType::kSelected, {}, outcome, kReplyTimeout);
}

absl::Status ReceiverLink::HandleFrame(const FrameHeader& header) {
  switch (header.type) {
    case FrameType::kProbe:
      return HandleProbe(header);
    case FrameType::kSelect:
      return HandleSelect(header);
    case FrameType::kOpen:
      return HandleOpen(header);
    case FrameType::kData:
      return HandleData(header);
    case FrameType::kFinish:
      return HandleFinish(header);
    case FrameType::kQuiet:
      return HandleQuiet(header);
    case FrameType::kHello:  // repeated
      TANDEM_RETURN_IF_ERROR(CountStray(header));
      return Discard(header.payload_bytes);
    default:
      return InvalidArgument("a sender may not send {}", FrameTypeName(header.type));
  }
}

absl::Status ReceiverLink::HandleProbe(const FrameHeader& header) {
  if (bound_.reader == nullptr) return InvalidArgument("PROBE before a transport was selected");
  // What it brings may lie where transfers lie.
  if (authenticated_) return InvalidArgument("PROBE after a transfer was opened");
  probed_bytes_ += header.payload_bytes;
  if (probed_bytes_ > kMaxProbedBytes || ++probes_ > kMaxProbes) {
    return InvalidArgument("link probe is too long");
  }
  TANDEM_ASSIGN_OR_RETURN(const uint64_t digest, bound_.reader->Probe(header));
  FrameHeader reply;
  reply.type = FrameType::kProbeAck;
  reply.ordinal_begin = header.ordinal_begin;
  std::string payload(sizeof(digest), '\0');
  std::memcpy(payload.data(), &digest, sizeof(digest));
  return SendControl(connection_.get(), reply, payload, kReplyTimeout);
}

absl::Status ReceiverLink::Discard(size_t bytes) {
  while (bytes > 0) {
    const size_t n = std::min(bytes, scratch_.size());
    TANDEM_RETURN_IF_ERROR(ReceiveAll(connection_.get(), MutableBytes(scratch_).first(n),
                                      authenticated_ ? context_->options->io_timeout : Patience()));
    bytes -= n;
  }
  return absl::OkStatus();
}

absl::Status ReceiverLink::DiscardData(const FrameHeader& header) {
  ++context_->counters->late_frames;
  return bound_.reader->Receive(header, std::make_shared<UnwantedReception>(header));
}

absl::Status ReceiverLink::AnswerAbort(const TransferKey& key, const absl::Status& why) {
  return SendStatus(connection_.get(), FrameType::kAbort, key, why, kReplyTimeout);
}

absl::Status ReceiverLink::RequireAuthenticated(const FrameHeader& header) {
  if (authenticated_) return absl::OkStatus();
  ++context_->counters->auth_failures;
  return absl::UnauthenticatedError(fmt::format("{} before any token", FrameTypeName(header.type)));
}

absl::Status ReceiverLink::CountStray(const FrameHeader& header) {
  if (authenticated_ || ++stray_frames_ <= kMaxStrayFrames) return absl::OkStatus();
  ++context_->counters->auth_failures;
  return absl::UnauthenticatedError(
      fmt::format("too many {} before any token", FrameTypeName(header.type)));
}

absl::Status ReceiverLink::HandleOpen(const FrameHeader& header) {
  if (header.payload_bytes != kKvTokenBytes) {
    return InvalidArgument("OPEN with a token of {} bytes", header.payload_bytes);
  }
  TANDEM_ASSIGN_OR_RETURN(const std::string token, ReceiveControl(connection_.get(), header,
                                                                  context_->options->auth_timeout));
  if (bound_.reader == nullptr) return InvalidArgument("OPEN before a transport was selected");
  const TransferKey key = KeyOf(header);
  const std::shared_ptr<IncomingTransfer> transfer = context_->table->Find(key);
  if (transfer == nullptr) {
    TANDEM_RETURN_IF_ERROR(CountStray(header));
    return AnswerAbort(key, NotFound("the receiver does not expect this transfer"));
  }
  if (!transfer->TokenMatches(token)) {
    ++context_->counters->auth_failures;
    return absl::UnauthenticatedError(fmt::format("wrong token for transfer {}", key.ToString()));
  }
  if (!transfer->MayBeSentBy(peer_worker_)) {
    ++context_->counters->auth_failures;
    return PermissionDenied("transfer {} is to come from another worker", key.ToString());
  }
  authenticated_ = true;
  const absl::StatusOr<std::string> grant = transfer->Open(bound_, header.ordinal_count);
  ForgetQuietTransfers();
  opened_.emplace(key, transfer);
  if (!grant.ok()) return AnswerAbort(key, grant.status());
  if (!bound_.transport->capabilities().one_sided) return absl::OkStatus();
  FrameHeader reply;
  reply.type = FrameType::kOpened;
  reply.id = key.id;
  reply.epoch = key.epoch;
  return SendControl(connection_.get(), reply, *grant, kReplyTimeout);
}

void ReceiverLink::ForgetQuietTransfers() {
  if (opened_.size() < forget_at_) return;
  absl::erase_if(opened_, [](const auto& entry) { return entry.second->quiet(); });
  forget_at_ = 2 * opened_.size() + 64;
}

absl::Status ReceiverLink::HandleData(const FrameHeader& header) {
  TANDEM_RETURN_IF_ERROR(RequireAuthenticated(header));
  const TransferKey key = KeyOf(header);
  const std::shared_ptr<IncomingTransfer> transfer = context_->table->Find(key);
  if (transfer == nullptr) {
    TANDEM_RETURN_IF_ERROR(DiscardData(header));
    return AnswerAbort(key, NotFound("the receiver does not expect this transfer"));
  }
  TANDEM_ASSIGN_OR_RETURN(const IncomingTransfer::Receipt receipt,
                          transfer->ReceiveData(bound_, header));
  if (receipt == IncomingTransfer::Receipt::kTaken) return absl::OkStatus();
  return AnswerAbort(key, Cancelled("transfer is not open at the receiver"));
}

absl::Status ReceiverLink::HandleFinish(const FrameHeader& header) {
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
  const HeadRange heads = {static_cast<int>(header.head_begin),
                           static_cast<int>(header.head_count)};
  TANDEM_ASSIGN_OR_RETURN(const IncomingTransfer::Receipt receipt,
                          transfer->Finish(connection_.get(), heads, std::move(digests)));
  on_change_();
  if (receipt == IncomingTransfer::Receipt::kTaken) return absl::OkStatus();
  return AnswerAbort(key, Cancelled("transfer is not open at the receiver"));
}

absl::Status ReceiverLink::HandleQuiet(const FrameHeader& header) {
  TANDEM_RETURN_IF_ERROR(RequireAuthenticated(header));
  TANDEM_ASSIGN_OR_RETURN(const std::string message,
                          ReceiveControl(connection_.get(), header, context_->options->io_timeout));
  if (const auto transfer = context_->table->Find(KeyOf(header)); transfer != nullptr) {
    transfer->SenderQuiet(connection_.get(), StatusOfFrame(header, message));
  }
  return absl::OkStatus();
}

}  // namespace tandem::kvtransfer
