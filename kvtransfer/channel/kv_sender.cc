// KvSender: which peer carries which transfer. The work is in SenderPeer.
#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "common/base/host_port.h"
#include "common/base/status.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/sender_peer.h"
#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {
namespace {

class KvSenderImpl : public KvSender {
 public:
  KvSenderImpl(KvSenderOptions options, std::unique_ptr<KvStore> own_store, const KvStore* store,
               std::vector<RegisteredTransport> transports)
      : options_(std::move(options)),
        own_store_(std::move(own_store)),
        own_network_(options_.tls ? MakeTlsNetwork(options_.tls) : nullptr),
        transports_(std::move(transports)),
        counters_(options_.metrics, "sender"),
        context_{{&options_, store, &transports_, Network(), &counters_},
                 [this](const TransferKey& key, const absl::Status& status,
                        const TransferStats& stats) { Done(key, status, stats); }} {}

  ~KvSenderImpl() override {
    Peers peers;
    {
      absl::MutexLock lock(&mutex_);
      peers.swap(peers_);
      closing_ = true;
    }
    // Joins their threads; their last on_done come here.
    for (auto& [key, peer] : peers) peer->Stop();
  }

  absl::Status Open(KvSendTarget target) override {
    TANDEM_RETURN_IF_ERROR(CheckTransports(target.transport));
    TANDEM_RETURN_IF_ERROR(ParseHostPort(target.address).status());
    if (target.token.size() != kKvTokenBytes) {
      return InvalidArgument("token must have {} bytes, got {}", kKvTokenBytes,
                             target.token.size());
    }
    if (target.target_blocks.size() > kMaxOrdinals) {
      return InvalidArgument("target_blocks must be at most {}, got {}", kMaxOrdinals,
                             target.target_blocks.size());
    }
    TANDEM_RETURN_IF_ERROR(
        ValidateBlocks("target_blocks", target.target_blocks, static_cast<int>(kMaxOrdinals)));
    std::vector<std::shared_ptr<SenderPeer>> idle;  // destroyed after the lock: that joins threads
    absl::MutexLock lock(&mutex_);
    if (closing_) return Cancelled("sender is closing");
    const TransferKey key = {target.id, target.epoch};
    if (peer_of_.contains(key)) {
      return AlreadyExists("transfer {} is under way already", key.ToString());
    }
    // The worker id is part of the key: an address taken over by another worker is another peer.
    const auto peer_key = std::make_pair(target.address, target.peer_worker_id);
    if (!peers_.contains(peer_key)) {
      DropIdlePeers(target.peer_worker_id, &idle);
      if (peers_.size() >= static_cast<size_t>(options_.max_peers)) {
        return ResourceExhausted("{} KV peers are open, the limit", options_.max_peers);
      }
      peers_[peer_key] = std::make_shared<SenderPeer>(
          PeerAddress{target.address, target.peer_worker_id, target.transport}, &context_);
    }
    const std::shared_ptr<SenderPeer>& peer = peers_[peer_key];
    peer_of_.emplace(key, peer);
    peer->Open(std::move(target));
    return absl::OkStatus();
  }

  void Push(const TransferId& id, uint64_t epoch, int layer, std::span<const int32_t> source_blocks,
            std::span<const int32_t> ordinals, std::shared_ptr<const ReadyEvent> ready) override {
    const TransferKey key = {id, epoch};
    const std::shared_ptr<SenderPeer> peer = PeerOf(key);
    if (peer == nullptr) return;
    if (source_blocks.size() != ordinals.size()) {
      // As a run that no transfer has, so that the transfer fails like on any malformed push.
      const int32_t impossible = -1;
      peer->Push(key, layer, {&impossible, 1}, {&impossible, 1}, nullptr);
      return;
    }
    peer->Push(key, layer, source_blocks, ordinals, std::move(ready));
  }

  void Finish(const TransferId& id, uint64_t epoch) override {
    const TransferKey key = {id, epoch};
    if (const auto peer = PeerOf(key); peer != nullptr) peer->Finish(key);
  }

  void Abort(const TransferId& id, uint64_t epoch) override {
    const TransferKey key = {id, epoch};
    if (const auto peer = PeerOf(key); peer != nullptr) peer->Abort(key);
  }

  std::vector<uint64_t> Digest(std::span<const int32_t> blocks) const override {
    const KvStore& store = *context_.link.store;
    const KvPoolShape& shape = store.shape();
    return store.DigestRun({0, shape.layout.num_layers, shape.heads(), blocks, {}});
  }

  std::map<std::string, KvLink> Links() const override {
    std::map<std::string, KvLink> links;
    absl::MutexLock lock(&mutex_);
    for (const auto& [key, peer] : peers_) {
      const auto link = peer->Link();
      if (!link.has_value()) continue;
      // A worker that was started again at another address may still be known by the one before.
      if (peer->idle()) {
        links.insert(*link);
      } else {
        links.insert_or_assign(link->first, link->second);
      }
    }
    return links;
  }

  KvTransferCounters Counters() const override { return counters_.Snapshot(); }

 private:
  KvNetwork* Network() const {
    if (options_.network != nullptr) return options_.network;
    return own_network_ != nullptr ? own_network_.get() : TcpNetwork();
  }

  using Peers =
      absl::flat_hash_map<std::pair<std::string, std::string>, std::shared_ptr<SenderPeer>>;
  // So many peers are kept whether or not they are connected: their link rates are worth something.
  static constexpr size_t kKeepIdlePeers = 32;

  absl::Status CheckTransports(const std::string& offered) const {
    TANDEM_ASSIGN_OR_RETURN(const std::vector<KvTransport*> theirs, ParseTransports(offered));
    for (const RegisteredTransport& own : transports_) {
      if (std::find(theirs.begin(), theirs.end(), own.transport) != theirs.end()) {
        return absl::OkStatus();
      }
    }
    return InvalidArgument(
        "the receiver offers transport {}, which is not among this sender's ({})", offered,
        options_.transports);
  }

  std::shared_ptr<SenderPeer> PeerOf(const TransferKey& key) const {
    absl::MutexLock lock(&mutex_);
    const auto it = peer_of_.find(key);
    return it == peer_of_.end() ? nullptr : it->second.lock();
  }

  // Those of `worker_id` at other addresses, which were other processes; all, where there are many.
  void DropIdlePeers(const std::string& worker_id,
                     std::vector<std::shared_ptr<SenderPeer>>* dropped)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const bool many = peers_.size() >= kKeepIdlePeers;
    absl::erase_if(peers_, [&](auto& entry) {
      if (!entry.second->idle() || !(many || entry.first.second == worker_id)) return false;
      dropped->push_back(std::move(entry.second));
      return true;
    });
  }

  void Done(const TransferKey& key, const absl::Status& status, const TransferStats& stats) {
    {
      absl::MutexLock lock(&mutex_);
      peer_of_.erase(key);
    }
    if (options_.on_done) options_.on_done(key.id, key.epoch, status, stats);
  }

  const KvSenderOptions options_;
  const std::unique_ptr<KvStore> own_store_;      // unless a test brought one
  const std::unique_ptr<KvNetwork> own_network_;  // null: another's
  const std::vector<RegisteredTransport> transports_;
  KvCounterBlock counters_;
  const SenderContext context_;
  mutable absl::Mutex mutex_;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;
  Peers peers_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<TransferKey, std::weak_ptr<SenderPeer>> peer_of_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::StatusOr<std::unique_ptr<KvSender>> KvSender::Start(KvSenderOptions options) {
  std::unique_ptr<KvStore> own_store;
  const KvStore* store = options.store;
  if (store == nullptr) {
    TANDEM_ASSIGN_OR_RETURN(own_store, MakeKvStore(options.region, options.shards));
    store = own_store.get();
  }
  TANDEM_RETURN_IF_ERROR(
      ValidateHello({options.worker_id, options.capability_digest, store->shape(), {}}));
  if (options.max_peers < 1) {
    return InvalidArgument("max_peers must be at least 1, got {}", options.max_peers);
  }
  if (!(options.min_link_bytes_per_second >= 0)) {
    return InvalidArgument("--min-kv-link-gbps must be at least 0, got {}",
                           options.min_link_bytes_per_second / 1e9);
  }
  TANDEM_ASSIGN_OR_RETURN(std::vector<RegisteredTransport> transports,
                          RegisterTransports(options.transports, store,
                                             {.connect = options.connect_timeout,
                                              .io = options.io_timeout,
                                              .encrypted = options.tls != nullptr}));
  return std::make_unique<KvSenderImpl>(std::move(options), std::move(own_store), store,
                                        std::move(transports));
}

}  // namespace tandem::kvtransfer
