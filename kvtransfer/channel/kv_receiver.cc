// KvReceiver: an acceptor thread, one thread per connection, and a housekeeper thread for timeouts,
// abort notices and ended connections.
#include <algorithm>
#include <deque>
#include <thread>

#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/host_port.h"
#include "common/base/log_limiter.h"
#include "common/base/status.h"
#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "kvtransfer/channel/receiver_link.h"
#include "kvtransfer/channel/transfer_table.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {
namespace {

constexpr absl::Duration kDetachTimeout = absl::Seconds(2);
constexpr absl::Duration kOverdue = absl::Milliseconds(50);

class KvReceiverImpl : public KvReceiver {
 public:
  KvReceiverImpl(KvReceiverOptions options, std::unique_ptr<KvStore> own_store,
                 const KvStore* store, std::vector<RegisteredTransport> transports,
                 std::unique_ptr<KvNetwork> own_network, std::unique_ptr<KvListener> listener,
                 std::string address)
      : options_(std::move(options)),
        own_store_(std::move(own_store)),
        transports_(std::move(transports)),
        hello_{options_.worker_id, options_.capability_digest, store->shape(), {}},
        address_(std::move(address)),
        counters_(options_.metrics, "receiver"),
        table_(store->shape().num_blocks),
        context_{&options_, store, &counters_, &table_},
        own_network_(std::move(own_network)),
        listener_(std::move(listener)),
        acceptor_([this] { AcceptLoop(); }),
        housekeeper_([this] { HousekeepingLoop(); }) {}

  ~KvReceiverImpl() override {
    {
      absl::MutexLock lock(&mutex_);
      closing_ = true;
    }
    listener_->Shutdown();
    acceptor_.join();
    // Nothing is added to connections_ from here on.
    {
      absl::MutexLock lock(&mutex_);
      for (Served& served : connections_) served.connection->Shutdown();
    }
    housekeeper_.join();  // joins the connections' threads
    WaitForWriters();
    for (const auto& transfer : table_.Live()) transfer->Close();
  }

  const std::string& address() const override { return address_; }

  absl::StatusOr<std::string> Expect(const TransferId& id, uint64_t epoch,
                                     std::vector<int32_t> blocks,
                                     const std::string& sender) override {
    if (blocks.size() > kMaxOrdinals) {
      return InvalidArgument("blocks must be at most {}, got {}", kMaxOrdinals, blocks.size());
    }
    std::string token = RandomBytes(kKvTokenBytes);
    TANDEM_RETURN_IF_ERROR(table_.Insert(std::make_shared<IncomingTransfer>(
        TransferKey{id, epoch}, std::move(blocks), token, sender, &context_)));
    return token;
  }

  void Cancel(const TransferId& id, uint64_t epoch) override {
    const std::shared_ptr<IncomingTransfer> transfer = table_.Find({id, epoch});
    if (transfer == nullptr) return;
    transfer->Cancel();
    WakeHousekeeper();
  }

  uint64_t BytesArrived(const TransferId& id, uint64_t epoch) const override {
    const std::shared_ptr<IncomingTransfer> transfer = table_.Find({id, epoch});
    return transfer == nullptr ? 0 : transfer->bytes_arrived();
  }

  KvTransferCounters Counters() const override { return counters_.Snapshot(); }

 private:
  struct Served {
    std::unique_ptr<ReceiverLink> connection;
    std::thread thread;
    bool dropped = false;  // shut down by this end
  };

  // Their connections are closed, so one-sided writers that still run detach at once.
  void WaitForWriters() {
    const absl::Time end = Clock::Real()->Now() + kDetachTimeout;
    while (Clock::Real()->Now() < end) {
      bool waiting = false;
      for (const auto& transfer : table_.Live()) {
        waiting = transfer->Tick(Clock::Real()->Now()) < end || waiting;
      }
      if (!waiting) return;
      absl::SleepFor(absl::Milliseconds(5));
    }
  }

  void WakeHousekeeper() {
    absl::MutexLock lock(&mutex_);
    wake_ = true;
  }

  void AcceptLoop() {
    while (true) {
      absl::StatusOr<std::unique_ptr<KvConnection>> accepted =
          listener_->Accept(absl::InfiniteDuration());
      absl::MutexLock lock(&mutex_);
      if (closing_) return;
      if (!accepted.ok()) {
        spdlog::warn("kv receiver: {}", MessageOf(accepted.status()));
        // Out of descriptors, most likely: leave others the time to give some back.
        const auto closing = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return closing_; };
        mutex_.AwaitWithTimeout(absl::Condition(&closing), absl::Milliseconds(100));
        continue;
      }
      if (const absl::Status room = MakeRoom(); !room.ok()) {
        ++counters_.refused_connections;
        if (limiter_.Allow()) {
          spdlog::warn("kv receiver: refused {}: {}{}", (*accepted)->peer(), MessageOf(room),
                       limiter_.Withheld());
        }
        continue;
      }
      if (closing_) return;
      auto connection = std::make_unique<ReceiverLink>(
          std::shared_ptr<KvConnection>(std::move(*accepted)), &context_, &hello_, transports_,
          [this] { WakeHousekeeper(); });
      ReceiverLink* raw = connection.get();
      connections_.push_back({std::move(connection), std::thread([raw] { raw->Run(); })});
      wake_ = true;  // it has a deadline
    }
  }

  // Ends connections that owe a proof or a token for too long, however busy they are; when to look
  // again.
  absl::Time ShutOverdue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const absl::Time now = Clock::Real()->Now();
    absl::Time next = absl::InfiniteFuture();
    for (Served& served : connections_) {
      const absl::Time deadline = served.connection->deadline();
      if (served.dropped || deadline == absl::InfiniteFuture()) continue;
      // The link looks itself, and says why; this is for one that never comes to it.
      const absl::Time overdue = deadline + kOverdue;
      if (overdue > now) {
        next = std::min(next, overdue);
        continue;
      }
      served.dropped = true;
      served.connection->Shutdown();
    }
    return next;
  }

  // For one more connection: workers' are counted apart from strangers', of whom the oldest goes.
  absl::Status MakeRoom() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (NumProved() >= options_.max_connections) {
      return ResourceExhausted("{} workers are connected, the limit", options_.max_connections);
    }
    if (NumStrangers() < options_.max_strangers) return absl::OkStatus();
    for (Served& served : connections_) {
      if (served.connection->proved() || served.dropped) continue;
      served.dropped = true;
      served.connection->Shutdown();
      break;
    }
    // Until its thread has ended, or threads would grow with the rate of connections.
    wake_ = true;
    const auto room = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return closing_ || NumStrangers() < options_.max_strangers;
    };
    mutex_.AwaitWithTimeout(absl::Condition(&room), absl::Milliseconds(100));
    if (NumStrangers() < options_.max_strangers) return absl::OkStatus();
    return ResourceExhausted("{} connections have proved nothing yet", NumStrangers());
  }
  // Of those that have ended none counts: a worker that comes back need not wait for a housekeeper
  // that is in a callback.
  int NumProved() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return static_cast<int>(
        std::count_if(connections_.begin(), connections_.end(), [](const Served& served) {
          return served.connection->proved() && !served.connection->finished();
        }));
  }
  int NumStrangers() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return static_cast<int>(
        std::count_if(connections_.begin(), connections_.end(),
                      [](const Served& served) { return !served.connection->proved(); }));
  }

  void HousekeepingLoop() {
    absl::Time next = absl::InfiniteFuture();
    while (true) {
      std::vector<Served> ended;
      {
        absl::MutexLock lock(&mutex_);
        const auto due = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
          return wake_ || (closing_ && connections_.empty());
        };
        mutex_.AwaitWithTimeout(absl::Condition(&due), next - Clock::Real()->Now());
        wake_ = false;
        next = ShutOverdue();
        for (auto it = connections_.begin(); it != connections_.end();) {
          if (!it->connection->finished()) {
            ++it;
            continue;
          }
          ended.push_back(std::move(*it));
          it = connections_.erase(it);
        }
        if (closing_ && connections_.empty() && ended.empty()) return;
      }
      for (Served& served : ended) served.thread.join();
      const absl::Time now = Clock::Real()->Now();
      for (const auto& transfer : table_.Live()) next = std::min(next, transfer->Tick(now));
    }
  }

  const KvReceiverOptions options_;
  const std::unique_ptr<KvStore> own_store_;  // unless a test brought one
  const std::vector<RegisteredTransport> transports_;
  const Hello hello_;
  const std::string address_;
  KvCounterBlock counters_;
  TransferTable table_;
  const ReceiverContext context_;
  const std::unique_ptr<KvNetwork> own_network_;  // null: another's
  const std::unique_ptr<KvListener> listener_;

  absl::Mutex mutex_;
  std::deque<Served> connections_ ABSL_GUARDED_BY(mutex_);
  bool wake_ ABSL_GUARDED_BY(mutex_) = false;
  LogLimiter limiter_;
  bool closing_ ABSL_GUARDED_BY(mutex_) = false;

  std::thread acceptor_;
  std::thread housekeeper_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<KvReceiver>> KvReceiver::Start(KvReceiverOptions options) {
  std::unique_ptr<KvStore> own_store;
  const KvStore* store = options.store;
  if (store == nullptr) {
    TANDEM_ASSIGN_OR_RETURN(own_store, MakeKvStore(options.region, options.shards));
    store = own_store.get();
  }
  TANDEM_RETURN_IF_ERROR(
      ValidateHello({options.worker_id, options.capability_digest, store->shape(), {}}));
  if (options.max_connections < 1 || options.max_strangers < 1) {
    return InvalidArgument("max_connections and max_strangers must be at least 1, got {} and {}",
                           options.max_connections, options.max_strangers);
  }
  if (options.port < 0 || options.port > 65535) {
    return InvalidArgument("port must be in [0, 65535], got {}", options.port);
  }
  TANDEM_ASSIGN_OR_RETURN(std::vector<RegisteredTransport> transports,
                          RegisterTransports(options.transports, store,
                                             {.io = options.io_timeout,
                                              .ring_bytes = options.ring_bytes,
                                              .encrypted = options.tls != nullptr}));
  std::unique_ptr<KvNetwork> own_network = options.tls ? MakeTlsNetwork(options.tls) : nullptr;
  KvNetwork* network = options.network;
  if (network == nullptr) network = own_network != nullptr ? own_network.get() : TcpNetwork();
  TANDEM_ASSIGN_OR_RETURN(std::unique_ptr<KvListener> listener,
                          network->Listen(options.listen_host, options.port));
  std::string address = listener->address();
  if (!options.advertise_host.empty()) {
    TANDEM_ASSIGN_OR_RETURN(HostPort announced, ParseHostPort(address));
    announced.host = options.advertise_host;
    address = announced.ToString();
  }
  return std::make_unique<KvReceiverImpl>(std::move(options), std::move(own_store), store,
                                          std::move(transports), std::move(own_network),
                                          std::move(listener), std::move(address));
}

}  // namespace tandem::kvtransfer
