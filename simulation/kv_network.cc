#include "simulation/kv_network.h"

#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "common/base/check.h"
#include "common/base/status.h"
#include "simulation/fake_model_runner.h"

namespace tandem {
namespace {

using Key = std::pair<TransferId, uint64_t>;  // id, epoch

}  // namespace

class InProcessKvNetwork::Receiver final : public kvtransfer::KvReceiver {
 public:
  Receiver(kvtransfer::KvReceiverOptions options, InProcessKvNetwork* network, std::string address)
      : options_(std::move(options)), network_(network), address_(std::move(address)) {}
  ~Receiver() override {
    absl::MutexLock lock(&network_->mutex_);
    network_->receivers_.erase(address_);
  }

  const std::string& address() const override { return address_; }

  absl::StatusOr<std::string> Expect(const TransferId& id, uint64_t epoch,
                                     std::vector<int32_t> blocks,
                                     const std::string& /*sender*/) override {
    absl::MutexLock lock(&mutex_);
    const std::string token = id.ToHex() + ":" + std::to_string(epoch);
    if (!transfers_.emplace(Key{id, epoch}, Transfer{.blocks = std::move(blocks)}).second) {
      return AlreadyExists("transfer {} epoch {} is known", id.ToHex(), epoch);
    }
    return token;
  }

  // Whoever never opened the transfer cannot write it: it is quiet at once.
  void Cancel(const TransferId& id, uint64_t epoch) override {
    bool quiet;
    {
      absl::MutexLock lock(&mutex_);
      const auto it = transfers_.find({id, epoch});
      if (it == transfers_.end()) return;
      it->second.cancelled = true;
      quiet = !it->second.opened;
      if (quiet) transfers_.erase(it);
    }
    if (quiet && options_.on_quiet) options_.on_quiet(id, epoch);
  }

  absl::Status Open(const kvtransfer::KvSendTarget& target) {
    absl::MutexLock lock(&mutex_);
    const auto it = transfers_.find({target.id, target.epoch});
    if (it == transfers_.end()) return Cancelled("transfer {} is not expected", target.id.ToHex());
    const Transfer& expected = it->second;
    TANDEM_CHECK(target.token == target.id.ToHex() + ":" + std::to_string(target.epoch),
                 "a wrong token");
    TANDEM_CHECK(target.target_blocks == expected.blocks, "other blocks than those expected");
    it->second.opened = true;
    return absl::OkStatus();
  }

  // Copies one block of one layer. False: it is not wanted any more.
  bool Write(const Key& key, int layer, int32_t ordinal, const std::byte* bytes) {
    absl::MutexLock lock(&mutex_);
    const auto it = transfers_.find(key);
    if (it == transfers_.end() || it->second.cancelled) return false;
    Transfer& transfer = it->second;
    TANDEM_CHECK(transfer.pieces.emplace(layer, ordinal).second, "a piece came twice");
    const int32_t block = transfer.blocks.at(static_cast<size_t>(ordinal));
    const KvRegion& region = options_.region;
    std::memcpy(region.Block(layer, block), bytes, region.layout.BlockLayerBytes());
    return true;
  }

  // The sender is done with the transfer, for better or worse.
  absl::Status End(const Key& key, const absl::Status& why, kvtransfer::TransferStats stats) {
    absl::Status result = why;
    {
      absl::MutexLock lock(&mutex_);
      const auto it = transfers_.find(key);
      if (it == transfers_.end()) return Cancelled("the receiver does not want it");
      const Transfer transfer = std::move(it->second);
      transfers_.erase(it);
      const size_t expected =
          transfer.blocks.size() * static_cast<size_t>(options_.region.layout.num_layers);
      if (transfer.cancelled) {
        result = Cancelled("the receiver does not want it");
      } else if (why.ok()) {
        TANDEM_CHECK(transfer.pieces.size() == expected, "{} of {} pieces were pushed",
                     transfer.pieces.size(), expected);
      }
    }
    if (result.ok()) {
      if (options_.on_sealed) options_.on_sealed(key.first, key.second, stats);
    } else if (!absl::IsCancelled(result) && options_.on_failed) {
      options_.on_failed(key.first, key.second, result);
    }
    if (options_.on_quiet) options_.on_quiet(key.first, key.second);
    return result;
  }

 private:
  struct Transfer {
    std::vector<int32_t> blocks;
    bool opened = false;
    bool cancelled = false;
    std::set<std::pair<int, int32_t>> pieces;  // (layer, ordinal)
  };

  const kvtransfer::KvReceiverOptions options_;
  InProcessKvNetwork* const network_;
  const std::string address_;
  absl::Mutex mutex_;
  absl::flat_hash_map<Key, Transfer> transfers_ ABSL_GUARDED_BY(mutex_);
};

class InProcessKvNetwork::Sender final : public kvtransfer::KvSender {
 public:
  Sender(kvtransfer::KvSenderOptions options, InProcessKvNetwork* network)
      : options_(std::move(options)), network_(network) {}

  absl::Status Open(kvtransfer::KvSendTarget target) override {
    const Key key = {target.id, target.epoch};
    {
      absl::MutexLock lock(&mutex_);
      transfers_[key] = Transfer{target.address, {}, {}};
    }
    const absl::Status status = WithReceiver(
        target.address, [&target](Receiver& receiver) { return receiver.Open(target); });
    if (!status.ok()) Done(key, status);
    return absl::OkStatus();
  }

  void Push(const TransferId& id, uint64_t epoch, int layer, std::span<const int32_t> source_blocks,
            std::span<const int32_t> ordinals, std::shared_ptr<const ReadyEvent> ready) override {
    const Key key = {id, epoch};
    {
      absl::MutexLock lock(&mutex_);
      const auto it = transfers_.find(key);
      if (it == transfers_.end()) return;
      it->second.pushed.push_back({layer,
                                   {source_blocks.begin(), source_blocks.end()},
                                   {ordinals.begin(), ordinals.end()},
                                   std::move(ready)});
    }
    SendReady(key);
  }

  void Finish(const TransferId& id, uint64_t epoch) override {
    TANDEM_CHECK(SendReady({id, epoch}), "a transfer was finished before its blocks were ready");
    End({id, epoch}, absl::OkStatus());
  }
  void Abort(const TransferId& id, uint64_t epoch) override {
    End({id, epoch}, absl::AbortedError("aborted by its sender"));
  }
  std::vector<uint64_t> Digest(std::span<const int32_t> blocks) const override {
    return engine::FakeBlockDigests(options_.region, blocks);
  }
  std::map<std::string, KvLink> Links() const override { return {}; }

 private:
  struct Pushed {
    int layer;
    std::vector<int32_t> source_blocks;
    std::vector<int32_t> ordinals;
    std::shared_ptr<const ReadyEvent> ready;  // null: at once
  };
  struct Transfer {
    std::string address;
    kvtransfer::TransferStats stats;
    std::vector<Pushed> pushed;  // and not yet sent
  };

  // Sends what is ready; false if something is not.
  bool SendReady(const Key& key) {
    std::string address;
    std::vector<Pushed> ready;
    bool all = true;
    {
      absl::MutexLock lock(&mutex_);
      const auto it = transfers_.find(key);
      if (it == transfers_.end()) return true;
      address = it->second.address;
      for (Pushed& pushed : std::exchange(it->second.pushed, {})) {
        const bool now = pushed.ready == nullptr || pushed.ready->Ready();
        (now ? ready : it->second.pushed).push_back(std::move(pushed));
      }
      all = it->second.pushed.empty();
    }
    for (const Pushed& pushed : ready) Send(key, address, pushed);
    return all;
  }
  void Send(const Key& key, const std::string& address, const Pushed& pushed) {
    (void)WithReceiver(address, [&](Receiver& receiver) {
      for (size_t i = 0; i < pushed.source_blocks.size(); ++i) {
        if (!receiver.Write(key, pushed.layer, pushed.ordinals[i],
                            options_.region.Block(pushed.layer, pushed.source_blocks[i]))) {
          break;
        }
        Count(key, options_.region.layout.BlockLayerBytes());
      }
      return absl::OkStatus();
    });
  }

  absl::Status WithReceiver(const std::string& address,
                            const std::function<absl::Status(Receiver&)>& act) {
    // Held throughout, so that the receiver does not go meanwhile. Its callbacks push to inboxes.
    absl::MutexLock lock(&network_->mutex_);
    const auto it = network_->receivers_.find(address);
    if (it == network_->receivers_.end()) return Unavailable("no KV receiver at {}", address);
    return act(*it->second);
  }
  void Count(const Key& key, size_t bytes) {
    absl::MutexLock lock(&mutex_);
    transfers_[key].stats.bytes += bytes;
  }
  void End(const Key& key, const absl::Status& why) {
    Transfer transfer;
    {
      absl::MutexLock lock(&mutex_);
      const auto it = transfers_.find(key);
      if (it == transfers_.end()) return;
      transfer = it->second;
    }
    transfer.stats.transport = "memory";
    Done(key, WithReceiver(transfer.address, [&](Receiver& receiver) {
           return receiver.End(key, why, transfer.stats);
         }));
  }
  void Done(const Key& key, const absl::Status& status) {
    kvtransfer::TransferStats stats;
    {
      absl::MutexLock lock(&mutex_);
      const auto it = transfers_.find(key);
      if (it == transfers_.end()) return;
      stats = it->second.stats;
      transfers_.erase(it);
    }
    if (options_.on_done) options_.on_done(key.first, key.second, status, stats);
  }

  const kvtransfer::KvSenderOptions options_;
  InProcessKvNetwork* const network_;
  absl::Mutex mutex_;
  absl::flat_hash_map<Key, Transfer> transfers_ ABSL_GUARDED_BY(mutex_);
};

std::unique_ptr<kvtransfer::KvReceiver> InProcessKvNetwork::MakeReceiver(
    kvtransfer::KvReceiverOptions options) {
  absl::MutexLock lock(&mutex_);
  const std::string address = "memory:" + std::to_string(++last_port_);
  auto receiver = std::make_unique<Receiver>(std::move(options), this, address);
  receivers_[address] = receiver.get();
  return receiver;
}

std::unique_ptr<kvtransfer::KvSender> InProcessKvNetwork::MakeSender(
    kvtransfer::KvSenderOptions options) {
  return std::make_unique<Sender>(std::move(options), this);
}

std::unique_ptr<kvtransfer::KvReceiver> LoopbackKvNetwork::MakeReceiver(
    kvtransfer::KvReceiverOptions options) {
  options.transports = transport_;
  auto receiver = kvtransfer::KvReceiver::Start(std::move(options));
  TANDEM_CHECK(receiver.ok(), "{}", receiver.status().ToString());
  return *std::move(receiver);
}

std::unique_ptr<kvtransfer::KvSender> LoopbackKvNetwork::MakeSender(
    kvtransfer::KvSenderOptions options) {
  options.transports = transport_;
  options.slow_link_bytes_per_second = 0;  // these pools are small
  options.link_test_time = absl::ZeroDuration();
  auto sender = kvtransfer::KvSender::Start(std::move(options));
  TANDEM_CHECK(sender.ok(), "{}", sender.status().ToString());
  return *std::move(sender);
}

}  // namespace tandem
