// The receiving end of one connection: handshake, choice of the transport, link probe, then frames
// until the connection ends.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"

#include "kvtransfer/channel/hello.h"
#include "kvtransfer/channel/incoming_transfer.h"
#include "kvtransfer/channel/registered_transport.h"
#include "kvtransfer/channel/transfer_table.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

// Run() belongs to one thread; the other methods may be called from any.
class ReceiverLink {
 public:
  // `on_change` is called, on Run()'s thread, when a transfer got a new deadline. Not owned:
  // `context`, `here` (without transports) and `transports`.
  ReceiverLink(std::shared_ptr<KvConnection> connection, const ReceiverContext* context,
               const Hello* here, std::span<const RegisteredTransport> transports,
               std::function<void()> on_change);

  // Serves the connection until it ends; then every transfer opened on it has ended too.
  void Run();
  void Shutdown() { connection_->Shutdown(); }
  bool finished() const { return finished_; }
  // The peer has proved the cluster secret.
  bool proved() const { return proved_; }
  // When it is to be shut down, unless it has shown by then what it owes; InfiniteFuture: nothing.
  absl::Time deadline() const;

 private:
  absl::Status Serve();
  absl::Status Greet();  // proofs and hellos
  absl::Status Handshake();
  // What this end offers to a peer that names `wanted`; keeps the offers.
  std::vector<TransportOffer> MakeOffers(const std::vector<TransportOffer>& wanted);
  // Stays awake for a moment where the next frame is due at once.
  void LookForFrame();
  absl::Status HandleFrame(const FrameHeader& header);
  absl::Status HandleSelect(const FrameHeader& header);
  absl::Status HandleOpen(const FrameHeader& header);
  absl::Status HandleData(const FrameHeader& header);
  absl::Status HandleFinish(const FrameHeader& header);
  absl::Status HandleQuiet(const FrameHeader& header);
  absl::Status HandleProbe(const FrameHeader& header);
  // Takes and forgets a payload that follows its header.
  absl::Status Discard(size_t bytes);
  // The same for DATA, whose payload is the transport's affair.
  absl::Status DiscardData(const FrameHeader& header);
  absl::Status AnswerAbort(const TransferKey& key, const absl::Status& why);
  absl::Duration Patience() const;  // until deadline()
  absl::Status RequireAuthenticated(const FrameHeader& header);
  // An error once too many frames have led nowhere.
  absl::Status CountStray(const FrameHeader& header);
  void ForgetQuietTransfers();

  struct PendingOffer {
    KvTransport* transport;
    std::unique_ptr<KvOffer> offer;
  };

  const std::shared_ptr<KvConnection> connection_;
  const ReceiverContext* const context_;
  const Hello* const here_;
  const std::span<const RegisteredTransport> transports_;
  const std::function<void()> on_change_;
  const absl::Time accepted_;
  std::atomic<bool> finished_{false};
  std::atomic<bool> proved_{false};
  std::atomic<bool> authenticated_{false};  // has shown the token of a transfer

  // Of Run()'s thread.
  std::vector<std::byte> scratch_;
  std::string peer_worker_;
  std::vector<PendingOffer> offers_;
  BoundConnection bound_;     // no reader before a transport was selected
  bool data_is_due_ = false;  // a one-sided writer is at work on what the next frame tells of
  size_t probed_bytes_ = 0;
  int probes_ = 0;
  int stray_frames_ = 0;  // before the first token: what a worker says at most a few times
  absl::flat_hash_map<TransferKey, std::shared_ptr<IncomingTransfer>> opened_;
  size_t forget_at_ = 64;
};

}  // namespace tandem::kvtransfer
