// KV shipments that take time on the links of their cards, and move no bytes worth a look: their
// ends are events of the queue that whoever drives the cluster runs. For long traffic without
// faults; what can go wrong on the way is virtual_kv_network.h's.
//
// A card sends one piece after the other, and receives so too. What a step computes leaves while it
// is computed, layer by layer: so a transfer is over when its last layer has crossed, or later
// where its links were busy.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"

#include "simulation/event_queue.h"
#include "simulation/kv_network.h"

namespace tandem {

struct TimedKvOptions {
  double bytes_per_second = 20e9;  // of a card's link, each way
  int64_t bytes_per_block = 0;     // of all layers, as the model has them; not those of the pool
  int num_layers = 1;              // of the model
};

// Not thread-safe. Outlives the endpoints that it made; `events` outlives this.
class TimedKvNetwork final : public InProcessKvNetwork {
 public:
  TimedKvNetwork(TimedKvOptions options, EventQueue* events) : options_(options), events_(events) {}

  std::unique_ptr<kvtransfer::KvReceiver> MakeReceiver(
      kvtransfer::KvReceiverOptions options) override;
  std::unique_ptr<kvtransfer::KvSender> MakeSender(kvtransfer::KvSenderOptions options) override;

 private:
  class Sender;
  using Key = std::pair<TransferId, uint64_t>;  // id, epoch

  // Books `blocks` that are computed between `begins` and `ends` (both now: they were cached).
  void Send(const Key& key, const std::string& from, const std::string& to, size_t blocks,
            absl::Time begins, absl::Time ends);
  // Calls `callback` when all that was booked for the transfer has crossed.
  void AtArrival(const Key& key, std::function<void()> callback);

  const TimedKvOptions options_;
  EventQueue* const events_;
  // When a card's link is free again.
  absl::flat_hash_map<std::string, absl::Time> sends_until_, receives_until_;
  absl::flat_hash_map<Key, absl::Time> arrives_;
};

}  // namespace tandem
