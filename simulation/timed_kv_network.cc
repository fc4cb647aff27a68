#include "simulation/timed_kv_network.h"

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "simulation/timed_model_runner.h"

namespace tandem {

// Books what is pushed, and leaves the rest to the network's own.
class TimedKvNetwork::Sender final : public kvtransfer::KvSender {
 public:
  Sender(TimedKvNetwork* network, std::string worker_id, std::unique_ptr<KvSender> inner)
      : network_(network), worker_id_(std::move(worker_id)), inner_(std::move(inner)) {}

  absl::Status Open(kvtransfer::KvSendTarget target) override {
    peers_[{target.id, target.epoch}] = target.peer_worker_id;
    known_.insert(
        {target.peer_worker_id, {.bytes_per_second = network_->options_.bytes_per_second}});
    return inner_->Open(std::move(target));
  }
  void Push(const TransferId& id, uint64_t epoch, int layer, std::span<const int32_t> source_blocks,
            std::span<const int32_t> ordinals, std::shared_ptr<const ReadyEvent> ready) override {
    if (layer == 0) {  // the other layers follow at once
      const auto* step = dynamic_cast<const engine::TimedEvent*>(ready.get());
      const absl::Time now = network_->events_->Now();
      network_->Send({id, epoch}, worker_id_, peers_[{id, epoch}], source_blocks.size(),
                     step != nullptr ? step->begins : now, step != nullptr ? step->ends : now);
    }
    inner_->Push(id, epoch, layer, source_blocks, ordinals, std::move(ready));
  }
  void Finish(const TransferId& id, uint64_t epoch) override {
    peers_.erase({id, epoch});
    inner_->Finish(id, epoch);
  }
  void Abort(const TransferId& id, uint64_t epoch) override {
    peers_.erase({id, epoch});
    inner_->Abort(id, epoch);
  }
  // Nothing is read back, so nothing could be damaged.
  std::vector<uint64_t> Digest(std::span<const int32_t> blocks) const override {
    return std::vector<uint64_t>(blocks.size());
  }
  std::map<std::string, KvLink> Links() const override { return known_; }

 private:
  TimedKvNetwork* const network_;
  const std::string worker_id_;
  const std::unique_ptr<KvSender> inner_;
  absl::flat_hash_map<Key, std::string> peers_;  // of open transfers: worker ids
  std::map<std::string, KvLink> known_;          // to each peer
};

std::unique_ptr<kvtransfer::KvReceiver> TimedKvNetwork::MakeReceiver(
    kvtransfer::KvReceiverOptions options) {
  options.on_sealed = [this, on_sealed = std::move(options.on_sealed)](
                          const TransferId& id, uint64_t epoch,
                          const kvtransfer::TransferStats& stats) {
    AtArrival({id, epoch}, [=] { on_sealed(id, epoch, stats); });
  };
  options.on_quiet = [this, on_quiet = std::move(options.on_quiet)](const TransferId& id,
                                                                    uint64_t epoch) {
    AtArrival({id, epoch}, [=] { on_quiet(id, epoch); });
  };
  return InProcessKvNetwork::MakeReceiver(std::move(options));
}

std::unique_ptr<kvtransfer::KvSender> TimedKvNetwork::MakeSender(
    kvtransfer::KvSenderOptions options) {
  options.on_done = [this, on_done = std::move(options.on_done)](
                        const TransferId& id, uint64_t epoch, const absl::Status& status,
                        const kvtransfer::TransferStats& stats) {
    AtArrival({id, epoch}, [=, this] {
      arrives_.erase({id, epoch});
      on_done(id, epoch, status, stats);
    });
  };
  const std::string worker_id = options.worker_id;
  return std::make_unique<Sender>(this, worker_id,
                                  InProcessKvNetwork::MakeSender(std::move(options)));
}

void TimedKvNetwork::Send(const Key& key, const std::string& from, const std::string& to,
                          size_t blocks, absl::Time begins, absl::Time ends) {
  const absl::Duration crossing =
      absl::Seconds(static_cast<double>(blocks) * static_cast<double>(options_.bytes_per_block) /
                    options_.bytes_per_second);
  const auto until = [&](auto& links, const std::string& name) -> absl::Time& {
    return links.try_emplace(name, absl::InfinitePast()).first->second;
  };
  absl::Time& sends = until(sends_until_, from);
  absl::Time& receives = until(receives_until_, to);
  // It may leave once its first layer is computed, and is not there before its last one is.
  const absl::Duration step = ends - begins;
  const absl::Time leaves = std::max({sends, receives, begins + step / options_.num_layers});
  const absl::Time arrives = std::max(leaves + crossing, ends + crossing / options_.num_layers);
  // While it waits for layers the links are free for others.
  sends = receives = std::max({sends, receives, arrives - crossing}) + crossing;
  absl::Time& whole = arrives_.try_emplace(key, arrives).first->second;
  whole = std::max(whole, arrives);
}

void TimedKvNetwork::AtArrival(const Key& key, std::function<void()> callback) {
  const auto it = arrives_.find(key);
  events_->At(it == arrives_.end() ? events_->Now() : it->second, std::move(callback));
}

}  // namespace tandem
