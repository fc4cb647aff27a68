// KV shipments under a virtual clock: frames that take time and meet faults.
//
// What decides about bytes is kvtransfer's own: IncomingTransfer and TransferTable (who may write
// which blocks until when, digests, quiet), OutgoingTransfer (what was sent, digests), frames and
// the store. Events stand in for its threads, and the handshake of a connection is left out. Two
// ways to move bytes, as the transports have: with the frames (tcp), or one-sided, by a sender that
// writes the receiver's pool under a grant and then says so (shm).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/time/time.h"

#include "simulation/event_queue.h"
#include "simulation/faults.h"
#include "simulation/kv_network.h"

namespace tandem {

// How long so many blocks take on the link from a prefill worker to a decode worker; a fraction: a
// layer's part of them.
using ShipTime = std::function<absl::Duration(double blocks)>;

struct VirtualKvOptions {
  bool one_sided = false;
  absl::Duration latency = absl::Microseconds(50);  // one way
  ShipTime ship_time = [](double blocks) { return absl::Microseconds(20) * blocks; };
  size_t max_blocks_of_a_frame = 64;
  Faults faults;
  // What time it is for the loop of this worker, which may be ahead of the queue's (WorkerClock).
  std::function<absl::Time(const std::string& worker_id)> loop_time;
  // An endpoint of this worker has said something to its loop.
  std::function<void(const std::string& worker_id)> on_event = [](const std::string&) {};
};

// Not thread-safe. Outlives the endpoints that it made.
class VirtualKvNetwork final : public InProcessKvNetwork {
 public:
  VirtualKvNetwork(VirtualKvOptions options, EventQueue* events);
  ~VirtualKvNetwork() override;

  std::string transport() const override { return options_.one_sided ? "shm" : "tcp"; }
  std::unique_ptr<kvtransfer::KvReceiver> MakeReceiver(
      kvtransfer::KvReceiverOptions options) override;
  std::unique_ptr<kvtransfer::KvSender> MakeSender(kvtransfer::KvSenderOptions options) override;

  // The worker's process is gone: nothing of it moves any more, and its connections end.
  void Kill(const std::string& worker_id);
  // Every connection of the worker ends, as far as the other end sees; both live on.
  void BreakLinks(const std::string& worker_id);
  // The worker's process stands still, and goes on then with what it was in the middle of, a write
  // into another's pool too, whatever has become of that meanwhile.
  void Stop(const std::string& worker_id, absl::Time until);
  // Whether the worker is in the middle of such a write.
  bool Writing(const std::string& worker_id) const;

 private:
  class Endpoint;
  class Receiver;
  class Sender;
  class Link;
  struct Frame;

  const VirtualKvOptions options_;
  EventQueue* const events_;
  uint64_t last_port_ = 0;
  std::map<std::string, Receiver*> receivers_;  // by address; those that live
  std::map<std::string, Sender*> senders_;      // by worker; those that live
};

}  // namespace tandem
