// KV shipments that take time on the links of their cards, by a clock that whoever drives the
// cluster moves.
//
// A card sends one piece after the other, and receives so too. What a step computes leaves while it
// is computed, layer by layer: so a transfer is over when its last layer has crossed, or later
// where its links were busy.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "simulation/kv_network.h"

namespace tandem {

struct TimedKvOptions {
  double bytes_per_second = 20e9;  // of a card's link, each way
  int64_t bytes_per_block = 0;     // of all layers, as the model has them; not those of the pool
  int num_layers = 1;              // of the model
};

// Thread-safe, but for Deliver. Outlives the endpoints that it made; `clock` outlives this.
class TimedKvNetwork final : public InProcessKvNetwork {
 public:
  TimedKvNetwork(TimedKvOptions options, Clock* clock) : options_(options), clock_(clock) {}

  std::unique_ptr<kvtransfer::KvReceiver> MakeReceiver(
      kvtransfer::KvReceiverOptions options) override;
  std::unique_ptr<kvtransfer::KvSender> MakeSender(kvtransfer::KvSenderOptions options) override;

  // Hands out what has arrived by now. False: nothing had.
  bool Deliver();
  // When the next transfer is over; InfiniteFuture where none is on its way.
  absl::Time NextArrival() const;

 private:
  class Sender;
  using Key = std::pair<TransferId, uint64_t>;  // id, epoch

  // Books `blocks` that are computed between `begins` and `ends` (both now: they were cached).
  void Send(const Key& key, const std::string& from, const std::string& to, size_t blocks,
            absl::Time begins, absl::Time ends);
  // Calls `callback` when all that was booked for the transfer has crossed.
  void AtArrival(const Key& key, std::function<void()> callback);

  const TimedKvOptions options_;
  Clock* const clock_;
  mutable absl::Mutex mutex_;
  // When a card's link is free again.
  absl::flat_hash_map<std::string, absl::Time> sends_until_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, absl::Time> receives_until_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<Key, absl::Time> arrives_ ABSL_GUARDED_BY(mutex_);
  std::multimap<absl::Time, std::function<void()>> due_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem
