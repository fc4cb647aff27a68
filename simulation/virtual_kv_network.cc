#include "simulation/virtual_kv_network.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "common/base/check.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"
#include "kvtransfer/channel/incoming_transfer.h"
#include "kvtransfer/channel/outgoing_transfer.h"
#include "kvtransfer/channel/transfer_table.h"
#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/transport/kv_transport.h"
#include "simulation/virtual_model_runner.h"

namespace tandem {
namespace {

using kvtransfer::ConstBytes;
using kvtransfer::FrameHeader;
using kvtransfer::FrameType;
using kvtransfer::KvFailure;
using kvtransfer::TransferKey;

// How often a sender looks whether a step that is late has computed what it is to send.
constexpr absl::Duration kLookAgain = absl::Milliseconds(50);

// Only what a transfer asks of it: connections are made elsewhere.
class Transport final : public kvtransfer::KvTransport {
 public:
  explicit Transport(bool one_sided)
      : name_(one_sided ? "shm" : "tcp"), capabilities_{.one_sided = one_sided} {}
  const std::string& name() const override { return name_; }
  const kvtransfer::KvCapabilities& capabilities() const override { return capabilities_; }
  absl::StatusOr<std::unique_ptr<kvtransfer::KvRegistration>> Register(
      const kvtransfer::KvStore* /*store*/, const kvtransfer::LinkTimeouts& /*timeouts*/) override {
    return absl::UnimplementedError("simulated");
  }

 private:
  const std::string name_;
  const kvtransfer::KvCapabilities capabilities_;
};

const Transport* TransportOf(bool one_sided) {
  static const Transport tcp(false), shm(true);
  return one_sided ? &shm : &tcp;
}

}  // namespace

struct VirtualKvNetwork::Frame {
  FrameHeader header;
  std::vector<std::byte> payload;

  bool Control() const { return header.type != FrameType::kData; }
  bool Sound() const {
    return !Control() || kvtransfer::PayloadDigest(payload) == header.payload_digest;
  }
};

// One connection. What is written one-sided goes beside it, and lasts longer than it may.
class VirtualKvNetwork::Link final : public kvtransfer::KvConnection,
                                     public kvtransfer::KvReader,
                                     public std::enable_shared_from_this<Link> {
 public:
  Link(VirtualKvNetwork* network, Sender* sender, Receiver* receiver, std::string from,
       std::string to)
      : network_(network),
        sender_(sender),
        receiver_(receiver),
        from_(std::move(from)),
        to_(std::move(to)) {}

  bool up() const { return up_; }
  Sender* sender() const { return sender_; }
  Receiver* receiver() const { return receiver_; }
  const std::string& from() const { return from_; }
  const std::string& to() const { return to_; }

  // The sender's end: the frame arrives a latency after `left`.
  void SendForward(Frame frame, absl::Time left) { SendFrame(std::move(frame), left, true); }
  // When the bytes of so many blocks may begin to leave, and when they have left.
  std::pair<absl::Time, absl::Time> Occupy(double blocks) {
    const absl::Time begin = std::max(free_, network_->events_->Now());
    free_ = begin + network_->options_.ship_time(blocks);
    return {begin, free_};
  }
  void Break();

  // One-sided.
  bool Granted(const std::string& grant) const { return grants_.contains(grant); }
  void BeginWrite() { ++writes_; }
  void EndWrite() { --writes_; }
  bool writing() const { return writes_ > 0; }
  void Detach() { detached_ = true; }

  // ---- KvConnection, at the receiver ----
  absl::Status Send(const FrameHeader& header, std::span<const ConstBytes> payload,
                    absl::Duration /*timeout*/) override {
    if (!up_) return Unavailable("the connection is gone");
    Frame frame{header, {}};
    for (const ConstBytes& part : payload) {
      frame.payload.insert(frame.payload.end(), part.begin(), part.end());
    }
    SendFrame(std::move(frame), network_->events_->Now(), false);
    return absl::OkStatus();
  }
  absl::StatusOr<FrameHeader> ReceiveHeader(absl::Duration /*timeout*/) override { return Never(); }
  absl::StatusOr<size_t> ReceiveSome(std::span<const kvtransfer::MutableBytes> /*into*/) override {
    return Never();
  }
  absl::Status WaitReadable(absl::Duration /*timeout*/) override { return Never(); }
  absl::Status WaitReadableOrInterrupt(absl::Duration /*timeout*/) override { return Never(); }
  void Interrupt() override {}
  void Shutdown() override { Break(); }
  const std::string& peer() const override { return from_; }

  // ---- KvReader ----
  void SetPayload(std::span<const std::byte> payload) { payload_ = payload; }
  absl::Status Receive(const FrameHeader& header,
                       std::shared_ptr<kvtransfer::Reception> reception) override;
  absl::StatusOr<uint64_t> Probe(const FrameHeader& /*header*/) override { return Never(); }
  absl::StatusOr<std::string> Grant() override {
    std::string grant = "grant " + std::to_string(++last_grant_);
    grants_.insert(grant);
    return grant;
  }
  void Revoke(const std::string& grant) override { grants_.erase(grant); }
  void Release(const std::string& grant) override { grants_.erase(grant); }
  bool WriterGone() override { return !network_->options_.one_sided || detached_; }

 private:
  static absl::Status Never() { return absl::UnimplementedError("events bring what comes"); }
  void SendFrame(Frame frame, absl::Time left, bool forward);
  void Deliver(const Frame& frame, bool forward);

  VirtualKvNetwork* const network_;
  Sender* const sender_;
  Receiver* const receiver_;
  const std::string from_, to_;
  bool up_ = true;
  absl::Time free_ = absl::InfinitePast();
  absl::Time last_forward_ = absl::InfinitePast(), last_backward_ = absl::InfinitePast();
  std::span<const std::byte> payload_;  // of the frame that is being received
  std::set<std::string> grants_;
  int last_grant_ = 0;
  int writes_ = 0;
  bool detached_ = false;
};

// What the threads of an endpoint do, as events of its process: nothing once that is dead, and
// nothing while it is stopped.
class VirtualKvNetwork::Endpoint {
 public:
  explicit Endpoint(EventQueue* events) : events_(events) {}

  void Kill() { dead_ = true; }
  bool dead() const { return dead_; }
  void Stop(absl::Time until) { stopped_until_ = std::max(stopped_until_, until); }

  // Now, unless it is stopped.
  void Do(std::function<void()> act) {
    if (dead_) return;
    if (events_->Now() < stopped_until_) return At(stopped_until_, std::move(act));
    act();
  }
  void At(absl::Time when, std::function<void()> act) {
    events_->At(when, [this, act = std::move(act)] { Do(act); });
  }
  void After(absl::Duration delay, std::function<void()> act) {
    At(events_->Now() + delay, std::move(act));
  }

 private:
  EventQueue* const events_;
  bool dead_ = false;
  absl::Time stopped_until_ = absl::InfinitePast();
};

class VirtualKvNetwork::Receiver final : public kvtransfer::KvReceiver {
 public:
  Receiver(kvtransfer::KvReceiverOptions options, VirtualKvNetwork* network, std::string address)
      : options_(Wrap(std::move(options), network)),
        network_(network),
        process_(network->events_),
        address_(std::move(address)),
        store_(MakeStore(options_.region)),
        table_(options_.region.num_blocks),
        context_{&options_, store_.get(), &counters_, &table_} {}
  ~Receiver() override { network_->receivers_.erase(address_); }

  const std::string& address() const override { return address_; }
  const std::string& worker_id() const { return options_.worker_id; }
  const kvtransfer::KvStore& store() const { return *store_; }

  absl::StatusOr<std::string> Expect(const TransferId& id, uint64_t epoch,
                                     std::vector<int32_t> blocks,
                                     const std::string& sender) override {
    std::string token = std::to_string(++last_token_);
    token.resize(kvtransfer::kKvTokenBytes, '.');
    auto transfer = std::make_shared<kvtransfer::IncomingTransfer>(
        TransferKey{id, epoch}, std::move(blocks), token, sender, &context_);
    TANDEM_RETURN_IF_ERROR(table_.Insert(transfer));
    live_.push_back(std::move(transfer));
    return token;
  }
  void Cancel(const TransferId& id, uint64_t epoch) override {
    const auto transfer = table_.Find({id, epoch});
    if (transfer == nullptr) return;
    transfer->Cancel();
    LookSoon();
  }
  uint64_t BytesArrived(const TransferId& id, uint64_t epoch) const override {
    const auto transfer = table_.Find({id, epoch});
    return transfer == nullptr ? 0 : transfer->bytes_arrived();
  }

  Endpoint& process() { return process_; }

  void OnFrame(const std::shared_ptr<Link>& link, const Frame& frame) {
    if (const absl::Status status = Handle(link, frame); !status.ok()) link->Break();
    Look();
  }
  void OnLost(const std::shared_ptr<Link>& link) {
    for (const auto& transfer : Opened(link.get())) {
      transfer->ConnectionLost(link.get(), Unavailable("the connection is gone"));
    }
    Look();
  }

 private:
  using Transfers = std::vector<std::shared_ptr<kvtransfer::IncomingTransfer>>;

  static kvtransfer::KvReceiverOptions Wrap(kvtransfer::KvReceiverOptions options,
                                            VirtualKvNetwork* network) {
    options.clock = &network->events_->clock();
    return options;
  }
  static std::unique_ptr<kvtransfer::KvStore> MakeStore(const KvRegion& region) {
    auto store = kvtransfer::MakeKvStore(region);
    TANDEM_CHECK(store.ok(), "{}", store.status().ToString());
    return *std::move(store);
  }
  Transfers Opened(const Link* link) const {
    Transfers out;
    for (const auto& transfer : live_) {
      const auto it = opened_.find(transfer->key());
      if (it != opened_.end() && it->second == link) out.push_back(transfer);
    }
    return out;
  }

  // As ReceiverLink does. An error ends the connection.
  absl::Status Handle(const std::shared_ptr<Link>& link, const Frame& frame) {
    const FrameHeader& header = frame.header;
    const TransferKey key = {header.id, header.epoch};
    const kvtransfer::BoundConnection bound = {link, link,
                                               TransportOf(network_->options_.one_sided)};
    if (!frame.Sound()) return DataLoss("a control frame fails its digest");
    const auto transfer = table_.Find(key);
    using Receipt = kvtransfer::IncomingTransfer::Receipt;
    switch (header.type) {
      case FrameType::kOpen: {
        if (transfer == nullptr) return Abort(link, key);
        const std::string_view token(reinterpret_cast<const char*>(frame.payload.data()),
                                     frame.payload.size());
        if (!transfer->TokenMatches(token)) return absl::UnauthenticatedError("wrong token");
        opened_.emplace(key, link.get());
        const absl::StatusOr<std::string> grant = transfer->Open(bound, header.ordinal_count);
        if (!grant.ok()) return Abort(link, key);
        if (!network_->options_.one_sided) return absl::OkStatus();
        FrameHeader reply;
        reply.type = FrameType::kOpened;
        reply.id = key.id;
        reply.epoch = key.epoch;
        return kvtransfer::SendControl(link.get(), reply, *grant, absl::InfiniteDuration());
      }
      case FrameType::kData: {
        if (transfer == nullptr) return Abort(link, key);
        link->SetPayload(frame.payload);
        TANDEM_ASSIGN_OR_RETURN(const Receipt receipt, transfer->ReceiveData(bound, header));
        return receipt == Receipt::kTaken ? absl::OkStatus() : Abort(link, key);
      }
      case FrameType::kFinish: {
        if (transfer == nullptr) return Abort(link, key);
        std::vector<uint64_t> digests(transfer->blocks().size());
        if (frame.payload.size() != digests.size() * sizeof(uint64_t)) {
          return InvalidArgument("FINISH of {} bytes", frame.payload.size());
        }
        if (!digests.empty()) {
          std::memcpy(digests.data(), frame.payload.data(), frame.payload.size());
        }
        const kvtransfer::HeadRange heads = {static_cast<int>(header.head_begin),
                                             static_cast<int>(header.head_count)};
        TANDEM_ASSIGN_OR_RETURN(const Receipt receipt,
                                transfer->Finish(link.get(), heads, std::move(digests)));
        return receipt == Receipt::kTaken ? absl::OkStatus() : Abort(link, key);
      }
      case FrameType::kQuiet:
        if (transfer != nullptr) transfer->SenderQuiet(link.get(), absl::AbortedError("quiet"));
        return absl::OkStatus();
      default:
        return InvalidArgument("a sender may not send this");
    }
  }
  static absl::Status Abort(const std::shared_ptr<Link>& link, const TransferKey& key) {
    return kvtransfer::SendStatus(link.get(), FrameType::kAbort, key,
                                  Cancelled("not open at the receiver"), absl::InfiniteDuration());
  }

  // What the housekeeper does: timeouts and abort notices.
  void LookSoon() {
    process_.After(absl::ZeroDuration(), [this] { Look(); });
  }
  void Look() {
    const absl::Time now = network_->events_->Now();
    absl::Time next = absl::InfiniteFuture();
    const Transfers live = live_;
    for (const auto& transfer : live) next = std::min(next, transfer->Tick(now));
    std::erase_if(live_, [this](const auto& transfer) {
      if (!transfer->quiet()) return false;
      opened_.erase(transfer->key());
      return true;
    });
    if (next < absl::InfiniteFuture() && (next < next_look_ || next_look_ <= now)) {
      next_look_ = std::max(next, now + absl::Microseconds(1));
      process_.At(next_look_, [this] { Look(); });
    }
    network_->options_.on_event(options_.worker_id);
  }

  const kvtransfer::KvReceiverOptions options_;
  VirtualKvNetwork* const network_;
  Endpoint process_;
  const std::string address_;
  const std::unique_ptr<kvtransfer::KvStore> store_;
  kvtransfer::KvCounterBlock counters_;
  kvtransfer::TransferTable table_;
  const kvtransfer::ReceiverContext context_;
  Transfers live_;  // in the order of Expect, so that a run is like the other
  absl::flat_hash_map<TransferKey, const Link*> opened_;
  absl::Time next_look_ = absl::InfinitePast();
  uint64_t last_token_ = 0;
};

class VirtualKvNetwork::Sender final : public kvtransfer::KvSender {
 public:
  Sender(kvtransfer::KvSenderOptions options, VirtualKvNetwork* network)
      : options_(std::move(options)), network_(network), process_(network->events_) {
    auto store = kvtransfer::MakeKvStore(options_.region);
    TANDEM_CHECK(store.ok(), "{}", store.status().ToString());
    store_ = *std::move(store);
    network_->senders_[options_.worker_id] = this;
  }
  ~Sender() override {
    const auto it = network_->senders_.find(options_.worker_id);
    if (it != network_->senders_.end() && it->second == this) network_->senders_.erase(it);
  }

  absl::Status Open(kvtransfer::KvSendTarget target) override {
    const TransferKey key = {target.id, target.epoch};
    if (transfers_.contains(key)) return AlreadyExists("transfer {} is under way", key.ToString());
    const std::string address = target.address;
    transfers_.emplace(key, Transfer{kvtransfer::OutgoingTransfer(std::move(target)), ++opened_});
    AtLoopTime([this, address] { Connect(address); });
    return absl::OkStatus();
  }

  void Push(const TransferId& id, uint64_t epoch, int layer, std::span<const int32_t> source_blocks,
            std::span<const int32_t> ordinals, std::shared_ptr<const ReadyEvent> ready) override {
    const TransferKey key = {id, epoch};
    const auto it = transfers_.find(key);
    if (it == transfers_.end()) return;
    absl::Time when = LoopTime();
    if (const auto* timed = dynamic_cast<const ScheduledEvent*>(ready.get())) {
      when = std::max(when, timed->at());
    }
    for (const kvtransfer::OrdinalRun& run :
         kvtransfer::SplitIntoRuns(ordinals, network_->options_.max_blocks_of_a_frame)) {
      const auto blocks = source_blocks.subspan(run.begin, run.count);
      ++it->second.unsent;
      process_.At(when, [this, key, ready,
                         pushed = kvtransfer::PushedRun{
                             layer, 1, ordinals[run.begin], {blocks.begin(), blocks.end()}}] {
        SendWhenReady(key, pushed, ready);
      });
    }
  }
  void Finish(const TransferId& id, uint64_t epoch) override {
    AtLoopTime([this, key = TransferKey{id, epoch}] {
      Transfer* transfer = Find(key);
      if (transfer == nullptr) return;
      transfer->out.finish_wanted = true;
      SendFinishIfDue(key);
    });
  }
  void Abort(const TransferId& id, uint64_t epoch) override {
    AtLoopTime([this, key = TransferKey{id, epoch}] {
      End(key, {absl::AbortedError("aborted by its sender"), std::nullopt, true});
    });
  }
  std::vector<uint64_t> Digest(std::span<const int32_t> blocks) const override {
    const kvtransfer::KvPoolShape& shape = store_->shape();
    return store_->DigestRun({0, shape.layout.num_layers, shape.heads(), blocks, {}});
  }
  std::map<std::string, KvLink> Links() const override { return {}; }

  void Kill() {
    process_.Kill();
    for (auto& [address, link] : links_) {
      if (link != nullptr) link->Detach();
    }
  }
  Endpoint& process() { return process_; }
  std::vector<std::shared_ptr<Link>> links() const {
    std::vector<std::shared_ptr<Link>> out;
    for (const auto& [address, link] : links_) {
      if (link != nullptr) out.push_back(link);
    }
    return out;
  }

  void OnFrame(const std::shared_ptr<Link>& link, const Frame& frame) {
    if (CurrentLink(link.get()) == nullptr) return;
    if (!frame.Sound()) return link->Break();
    const TransferKey key = {frame.header.id, frame.header.epoch};
    const std::string payload(reinterpret_cast<const char*>(frame.payload.data()),
                              frame.payload.size());
    Transfer* transfer = Find(key);
    switch (frame.header.type) {
      case FrameType::kOpened:
        if (transfer == nullptr || transfer->out.granted) return;
        transfer->out.grant = payload;
        transfer->out.granted = true;
        for (const auto& run : std::exchange(transfer->out.parked, {})) Post(key, run);
        SendFinishIfDue(key);
        return;
      case FrameType::kResult: {
        const absl::Status status = kvtransfer::StatusOfFrame(frame.header, payload);
        if (transfer == nullptr || (status.ok() && !transfer->out.finished)) return;
        return End(key, {status, std::nullopt, false});
      }
      case FrameType::kAbort: {
        const absl::Status why = kvtransfer::StatusOfFrame(frame.header, payload);
        if (transfer == nullptr) return SendQuiet(link, key, why);
        return End(key, {why, KvFailure::kPeerAborted, true});
      }
      default:
        return link->Break();
    }
  }
  // What is being written one-sided is written to its end first.
  void OnLost(const std::shared_ptr<Link>& link) {
    if (link->writing()) {
      process_.After(absl::Microseconds(100), [this, link] { OnLost(link); });
      return;
    }
    link->Detach();
    if (CurrentLink(link.get()) == nullptr) return;
    links_.erase(link->to());
    FailAll(link->to(), Unavailable("kv link to {} lost", link->to()), /*only_opened=*/true);
    if (!InOrder(link->to()).empty()) Connect(link->to());
  }

 private:
  struct Transfer {
    kvtransfer::OutgoingTransfer out;
    uint64_t order;
    bool opened = false;
    int unsent = 0;  // runs that were pushed and not posted
  };

  absl::Time LoopTime() const { return network_->options_.loop_time(options_.worker_id); }
  void AtLoopTime(std::function<void()> act) { process_.At(LoopTime(), std::move(act)); }
  Transfer* Find(const TransferKey& key) {
    const auto it = transfers_.find(key);
    return it == transfers_.end() ? nullptr : &it->second;
  }
  std::shared_ptr<Link> CurrentLink(const Link* link) const {
    const auto it = links_.find(link->to());
    return it != links_.end() && it->second.get() == link ? it->second : nullptr;
  }
  std::shared_ptr<Link> LinkOf(const kvtransfer::OutgoingTransfer& out) const {
    const auto it = links_.find(out.target.address);
    return it == links_.end() ? nullptr : it->second;
  }
  std::vector<TransferKey> InOrder(const std::string& address) const {
    std::map<uint64_t, TransferKey> keys;
    for (const auto& [key, transfer] : transfers_) {
      if (transfer.out.target.address == address) keys.emplace(transfer.order, key);
    }
    std::vector<TransferKey> out;
    for (const auto& [order, key] : keys) out.push_back(key);
    return out;
  }

  void Connect(const std::string& address) {
    const auto it = links_.find(address);
    if (it != links_.end()) {
      if (it->second != nullptr) SendOpens(it->second);
      return;  // null: it is being dialled
    }
    links_[address] = nullptr;
    process_.After(4 * network_->options_.latency, [this, address] {
      const auto receiver = network_->receivers_.find(address);
      if (receiver == network_->receivers_.end() || receiver->second->process().dead()) {
        links_.erase(address);
        FailAll(address, Unavailable("no KV receiver at {}", address), /*only_opened=*/false);
        return;
      }
      auto link =
          std::make_shared<Link>(network_, this, receiver->second, options_.worker_id, address);
      links_[address] = link;
      SendOpens(link);
    });
  }
  void SendOpens(const std::shared_ptr<Link>& link) {
    for (const TransferKey& key : InOrder(link->to())) {
      Transfer* transfer = Find(key);
      if (transfer == nullptr || transfer->opened) continue;
      kvtransfer::OutgoingTransfer& out = transfer->out;
      transfer->opened = true;
      const kvtransfer::KvPoolShape& shape = link->receiver()->store().shape();
      out.Begin(shape.layout.num_layers, shape.heads(), network_->transport());
      FrameHeader header;
      header.type = FrameType::kOpen;
      header.ordinal_count = static_cast<uint32_t>(out.target.target_blocks.size());
      SendControl(link, key, header, out.target.token);
      if (network_->options_.one_sided) {
        AnswerWithin(key, /*finished=*/false);
      } else {
        out.granted = true;
        for (const auto& run : std::exchange(out.parked, {})) Post(key, run);
        SendFinishIfDue(key);
      }
    }
  }
  void SendControl(const std::shared_ptr<Link>& link, const TransferKey& key, FrameHeader header,
                   std::string_view payload) {
    header.id = key.id;
    header.epoch = key.epoch;
    const auto* bytes = reinterpret_cast<const std::byte*>(payload.data());
    Frame frame{header, {bytes, bytes + payload.size()}};
    frame.header.payload_bytes = static_cast<uint32_t>(payload.size());
    frame.header.payload_digest = kvtransfer::PayloadDigest(frame.payload);
    link->SendForward(std::move(frame), link->Occupy(0).first);
  }
  void SendQuiet(const std::shared_ptr<Link>& link, const TransferKey& key,
                 const absl::Status& why) {
    FrameHeader header;
    header.type = FrameType::kQuiet;
    header.code = static_cast<uint32_t>(why.code());
    SendControl(link, key, header, "");
  }
  void AnswerWithin(const TransferKey& key, bool finished) {
    process_.After(options_.io_timeout, [this, key, finished] {
      const Transfer* transfer = Find(key);
      if (transfer == nullptr || (!finished && transfer->out.granted)) return;
      End(key, {DeadlineExceeded("the receiver did not answer"), KvFailure::kTimeout, true});
    });
  }

  void SendWhenReady(const TransferKey& key, const kvtransfer::PushedRun& run,
                     const std::shared_ptr<const ReadyEvent>& ready) {
    Transfer* transfer = Find(key);
    if (transfer == nullptr || transfer->out.end.has_value()) return;
    if (ready != nullptr && !ready->Ready()) {
      process_.After(kLookAgain, [this, key, run, ready] { SendWhenReady(key, run, ready); });
      return;
    }
    if (transfer->out.granted) return Post(key, run);
    transfer->out.parked.push_back(run);
  }
  void Post(const TransferKey& key, const kvtransfer::PushedRun& run) {
    Transfer* transfer = Find(key);
    const std::shared_ptr<Link> link = LinkOf(transfer->out);
    if (link == nullptr) return;  // about to fail
    const double blocks =
        static_cast<double>(run.source_blocks.size()) / store_->shape().layout.num_layers;
    const auto [begin, end] = link->Occupy(blocks);
    transfer->out.MarkSent(run);
    --transfer->unsent;
    ++transfer->out.posts;
    if (transfer->out.stats.bytes == 0) transfer->out.stats.first_byte = begin;
    const bool one_sided = network_->options_.one_sided;
    process_.At(begin, [this, key, run, link, end = end, one_sided] {
      one_sided ? BeginWrite(key, run, link, end) : SendBytes(key, run, link, end);
    });
  }
  kvtransfer::BlockRun RunOf(const kvtransfer::OutgoingTransfer& out,
                             const kvtransfer::PushedRun& run) const {
    return {run.layer_begin, run.layer_count, out.heads, run.source_blocks,
            std::span(out.target.target_blocks)
                .subspan(static_cast<size_t>(run.ordinal_begin), run.source_blocks.size())};
  }
  FrameHeader DataHeader(const TransferKey& key, const kvtransfer::OutgoingTransfer& out,
                         const kvtransfer::PushedRun& run) const {
    FrameHeader header;
    header.type = FrameType::kData;
    header.id = key.id;
    header.epoch = key.epoch;
    header.ordinal_begin = static_cast<uint32_t>(run.ordinal_begin);
    header.ordinal_count = static_cast<uint32_t>(run.source_blocks.size());
    header.layer_begin = static_cast<uint32_t>(run.layer_begin);
    header.layer_count = static_cast<uint32_t>(run.layer_count);
    header.head_begin = static_cast<uint32_t>(out.heads.begin);
    header.head_count = static_cast<uint32_t>(out.heads.count);
    header.payload_bytes = static_cast<uint32_t>(RunOf(out, run).Bytes(store_->shape().layout));
    return header;
  }
  void SendBytes(const TransferKey& key, const kvtransfer::PushedRun& run,
                 const std::shared_ptr<Link>& link, absl::Time end) {
    Transfer* transfer = Find(key);
    if (transfer == nullptr) return;
    Frame frame{DataHeader(key, transfer->out, run), {}};
    frame.payload.resize(frame.header.payload_bytes);
    std::vector<uint64_t> digests(run.source_blocks.size(), 0);
    store_->GatherRun(RunOf(transfer->out, run), frame.payload.data(), digests);
    Posted(key, run, digests, frame.header.payload_bytes);
    link->SendForward(std::move(frame), end);
    SendFinishIfDue(key);
  }
  void BeginWrite(const TransferKey& key, const kvtransfer::PushedRun& run,
                  const std::shared_ptr<Link>& link, absl::Time end) {
    Transfer* transfer = Find(key);
    if (transfer == nullptr) return;
    if (!link->Granted(transfer->out.grant)) {
      --transfer->out.posts;
      return End(key, {Cancelled("the grant was revoked"), KvFailure::kPeerAborted, true});
    }
    link->BeginWrite();
    process_.At(end, [this, key, run, link] { EndWrite(key, run, link); });
  }
  void EndWrite(const TransferKey& key, const kvtransfer::PushedRun& run,
                const std::shared_ptr<Link>& link) {
    link->EndWrite();
    Transfer* transfer = Find(key);
    if (transfer == nullptr) return;
    Frame frame{DataHeader(key, transfer->out, run), {}};
    std::vector<uint64_t> digests(run.source_blocks.size(), 0);
    if (!link->receiver()->process().dead()) {
      const kvtransfer::KvStore& target = link->receiver()->store();
      store_->CopyRun(RunOf(transfer->out, run), target.shape(), target.HostAddress(0),
                      kvtransfer::CopyMode::kCached, digests, [] { return true; });
    }
    Posted(key, run, digests, frame.header.payload_bytes);
    link->SendForward(std::move(frame), network_->events_->Now());
    if (transfer->out.end.has_value()) {
      if (transfer->out.posts == 0) Done(key, *transfer->out.end);
      return;
    }
    SendFinishIfDue(key);
  }
  void Posted(const TransferKey& key, const kvtransfer::PushedRun& run,
              std::span<const uint64_t> digests, uint64_t bytes) {
    kvtransfer::OutgoingTransfer& out = Find(key)->out;
    --out.posts;
    out.AddDigests(run.ordinal_begin, digests);
    out.stats.bytes += bytes;
    out.stats.last_byte = network_->events_->Now();
  }
  void SendFinishIfDue(const TransferKey& key) {
    Transfer* transfer = Find(key);
    if (transfer == nullptr || transfer->unsent > 0) return;
    kvtransfer::OutgoingTransfer& out = transfer->out;
    if (!out.finish_wanted || out.finished || out.end.has_value() || !out.granted ||
        out.posts > 0) {
      return;
    }
    TANDEM_CHECK(out.missing == 0, "a transfer was finished with {} pieces never pushed",
                 out.missing);
    const std::shared_ptr<Link> link = LinkOf(out);
    if (link == nullptr) return;
    FrameHeader header;
    header.type = FrameType::kFinish;
    header.head_begin = static_cast<uint32_t>(out.heads.begin);
    header.head_count = static_cast<uint32_t>(out.heads.count);
    out.finished = true;
    SendControl(link, key, header, out.DigestPayload());
    AnswerWithin(key, /*finished=*/true);
  }

  void End(const TransferKey& key, kvtransfer::TransferEnd end) {
    Transfer* transfer = Find(key);
    if (transfer == nullptr || transfer->out.end.has_value()) return;
    const std::shared_ptr<Link> link = LinkOf(transfer->out);
    if (network_->options_.one_sided && link != nullptr && link->writing() &&
        transfer->out.posts > 0) {
      transfer->out.end = std::move(end);
      // Of several posts those that have not begun do not begin: look when they would have ended.
      process_.After(absl::Milliseconds(1), [this, key] {
        Transfer* late = Find(key);
        if (late == nullptr) return;
        const std::shared_ptr<Link> now = LinkOf(late->out);
        kvtransfer::TransferEnd wanted = *std::exchange(late->out.end, std::nullopt);
        if (now != nullptr && now->writing()) return End(key, std::move(wanted));
        Done(key, wanted);
      });
      return;
    }
    Done(key, end);
  }
  void Done(const TransferKey& key, const kvtransfer::TransferEnd& wanted) {
    const kvtransfer::TransferEnd end = wanted;
    const auto it = transfers_.find(key);
    const kvtransfer::TransferStats stats = it->second.out.stats;
    const std::shared_ptr<Link> link = it->second.opened ? LinkOf(it->second.out) : nullptr;
    transfers_.erase(it);
    if (end.tell_quiet && link != nullptr) SendQuiet(link, key, end.status);
    if (options_.on_done) options_.on_done(key.id, key.epoch, end.status, stats);
    network_->options_.on_event(options_.worker_id);
  }
  void FailAll(const std::string& address, const absl::Status& status, bool only_opened) {
    for (const TransferKey& key : InOrder(address)) {
      if (only_opened && !Find(key)->opened) continue;
      Done(key, {status, KvFailure::kConnectionLost, false});
    }
  }

  const kvtransfer::KvSenderOptions options_;
  VirtualKvNetwork* const network_;
  Endpoint process_;
  std::unique_ptr<kvtransfer::KvStore> store_;
  absl::flat_hash_map<TransferKey, Transfer> transfers_;
  uint64_t opened_ = 0;
  std::map<std::string, std::shared_ptr<Link>> links_;  // by address; null: being dialled
};

absl::Status VirtualKvNetwork::Link::Receive(const FrameHeader& header,
                                             std::shared_ptr<kvtransfer::Reception> reception) {
  if (!network_->options_.one_sided) {
    if (payload_.size() < header.payload_bytes) return Unavailable("the connection was cut");
    size_t at = 0;
    for (const kvtransfer::TargetPiece& piece : reception->pieces()) {
      const bool go_on = !piece.wanted || reception->WriteGuarded([&] {
        std::memcpy(receiver_->store().HostAddress(piece.target_offset), payload_.data() + at,
                    piece.bytes);
      });
      if (!go_on) break;
      at += piece.bytes;
    }
  }
  reception->Done();
  return absl::OkStatus();
}

void VirtualKvNetwork::Link::SendFrame(Frame frame, absl::Time left, bool forward) {
  if (!up_) return;
  EventQueue& events = *network_->events_;
  Fate fate;
  if (network_->options_.faults) {
    const std::string& receiver = receiver_->worker_id();
    fate = network_->options_.faults({forward ? Message::Kind::kKvFrame : Message::Kind::kKvAnswer,
                                      forward ? from_ : receiver, forward ? receiver : from_});
  }
  if (fate.lost) return;
  if (fate.flipped && !frame.payload.empty()) {
    const size_t bit = events.num_events() * 7919 % (frame.payload.size() * 8);
    frame.payload[bit / 8] ^= std::byte{1} << (bit % 8);
  }
  if (fate.misplaced && !frame.Control()) {
    frame.header.ordinal_begin = frame.header.ordinal_begin == 0 ? 1 : 0;
  }
  if (fate.cut) frame.payload.resize(frame.payload.size() / 2);
  absl::Time& last = forward ? last_forward_ : last_backward_;
  absl::Time arrives = std::max(left + network_->options_.latency + fate.delay, last);
  if (fate.overtaken) {
    arrives += 5 * network_->options_.latency;
  } else {
    last = arrives;
  }
  for (int copy = 0; copy < (fate.twice ? 2 : 1); ++copy) {
    events.At(arrives, [self = shared_from_this(), frame, forward] {
      if (self->up_) self->Deliver(frame, forward);
    });
  }
  if (fate.cut) {
    events.At(arrives, [self = shared_from_this()] { self->Break(); });
  }
}

void VirtualKvNetwork::Link::Deliver(const Frame& frame, bool forward) {
  const auto self = shared_from_this();
  if (forward) {
    receiver_->process().Do([this, self, frame] { receiver_->OnFrame(self, frame); });
  } else {
    sender_->process().Do([this, self, frame] { sender_->OnFrame(self, frame); });
  }
}

void VirtualKvNetwork::Link::Break() {
  if (!up_) return;
  up_ = false;
  // A frame that arrived in the same moment is handled first, and so is what it began.
  receiver_->process().After(absl::Microseconds(1),
                             [self = shared_from_this()] { self->receiver_->OnLost(self); });
  sender_->process().After(network_->options_.latency,
                           [self = shared_from_this()] { self->sender_->OnLost(self); });
}

VirtualKvNetwork::VirtualKvNetwork(VirtualKvOptions options, EventQueue* events)
    : options_(std::move(options)), events_(events) {}
VirtualKvNetwork::~VirtualKvNetwork() = default;

std::unique_ptr<kvtransfer::KvReceiver> VirtualKvNetwork::MakeReceiver(
    kvtransfer::KvReceiverOptions options) {
  const std::string address = "10.0.0.1:" + std::to_string(++last_port_);
  auto receiver = std::make_unique<Receiver>(std::move(options), this, address);
  receivers_[address] = receiver.get();
  return receiver;
}

std::unique_ptr<kvtransfer::KvSender> VirtualKvNetwork::MakeSender(
    kvtransfer::KvSenderOptions options) {
  return std::make_unique<Sender>(std::move(options), this);
}

void VirtualKvNetwork::Kill(const std::string& worker_id) {
  BreakLinks(worker_id);
  for (auto& [address, receiver] : receivers_) {
    if (receiver->worker_id() == worker_id) receiver->process().Kill();
  }
  if (const auto it = senders_.find(worker_id); it != senders_.end()) it->second->Kill();
}

void VirtualKvNetwork::BreakLinks(const std::string& worker_id) {
  for (auto& [id, sender] : senders_) {
    for (const auto& link : sender->links()) {
      if (id == worker_id || link->receiver()->worker_id() == worker_id) link->Break();
    }
  }
}

void VirtualKvNetwork::Stop(const std::string& worker_id, absl::Time until) {
  for (auto& [address, receiver] : receivers_) {
    if (receiver->worker_id() == worker_id) receiver->process().Stop(until);
  }
  if (const auto it = senders_.find(worker_id); it != senders_.end()) {
    it->second->process().Stop(until);
  }
}

bool VirtualKvNetwork::Writing(const std::string& worker_id) const {
  const auto it = senders_.find(worker_id);
  if (it == senders_.end()) return false;
  const std::vector<std::shared_ptr<Link>> links = it->second->links();
  return std::any_of(links.begin(), links.end(), [](const auto& link) { return link->writing(); });
}

}  // namespace tandem
