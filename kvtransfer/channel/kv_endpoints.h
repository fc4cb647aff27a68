// The two ends of a KV shipment as the worker loops see them. A prefill worker owns one KvSender, a
// decode worker one KvReceiver; each has one channel per peer, and a channel one FIFO, over a
// KvTransport.
//
// Life of a transfer
//   decode   KvReceiver::Expect(id, epoch, blocks) -> a token for the sender
//   prefill  KvSender::Open(target) ... Push(blocks, layer) after every layer ... Finish() or
//   Abort() decode   every layer of every block arrived and all digests match -> on_sealed(id)
//            a digest differs, the channel dies, or the sender aborts   -> on_failed(id, status)
//   both     sender will write nothing more for (id, epoch)             -> on_quiet(id)
// A receiver that gives up calls Cancel(id): later frames are dropped, counted and answered with an
// abort; its blocks go to quarantine until on_quiet. on_quiet comes exactly once for every expected
// transfer, when the sender says so, when its channel dies, or, if no sender ever showed up,
// `no_sender_timeout` after Cancel.
//
// Thread-safe. Callbacks run on transport threads and must not block; they push to the worker's
// inbox.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/kv_layout.h"
#include "common/base/transfer_id.h"

namespace tandem {

// What a finished or failed transfer measured.
struct TransferStats {
  uint64_t bytes = 0;     // KV payload
  absl::Time first_byte;  // Clock::Real()
  absl::Time last_byte;
  std::string transport;  // "tcp"
};

struct KvReceiverOptions {
  std::string listen_host =
      "127.0.0.1";  // address to bind and, unless advertise_host is set, to announce
  std::string advertise_host;
  int port = 0;  // 0: any free port
  KvRegion region;
  std::string worker_id;
  std::string capability_digest;  // senders must present the same
  absl::Duration no_sender_timeout = absl::Seconds(10);
  std::function<void(const TransferId&, uint64_t epoch, const TransferStats&)> on_sealed;
  std::function<void(const TransferId&, uint64_t epoch, const absl::Status&)> on_failed;
  std::function<void(const TransferId&, uint64_t epoch)> on_quiet;
};

class KvReceiver {
 public:
  static absl::StatusOr<std::unique_ptr<KvReceiver>> Start(KvReceiverOptions options);
  virtual ~KvReceiver() = default;  // closes all channels; callbacks have ended when it returns

  // HOST:PORT that senders dial.
  virtual const std::string& address() const = 0;
  // From now on a sender may write `blocks` of the pool under (id, epoch). `blocks[i]` is named by
  // ordinal i on the wire. Returns the token to hand to the sender. ALREADY_EXISTS for a known (id,
  // epoch).
  virtual absl::StatusOr<std::string> Expect(const TransferId& id, uint64_t epoch,
                                             std::vector<int32_t> blocks) = 0;
  // No byte is written for (id, epoch) once this has returned. Idempotent; on_sealed and on_failed
  // no longer come.
  virtual void Cancel(const TransferId& id, uint64_t epoch) = 0;
};

struct KvSenderOptions {
  KvRegion region;
  std::string worker_id;
  std::string capability_digest;
  absl::Duration connect_timeout = absl::Seconds(5);
  absl::Duration io_timeout = absl::Seconds(20);  // a peer that takes nothing for so long is dead
  // All bytes were handed to the peer and acknowledged, or the transfer failed, or was aborted: the
  // source blocks may be released. Exactly once per Open.
  std::function<void(const TransferId&, uint64_t epoch, const absl::Status&, const TransferStats&)>
      on_done;
};

struct KvSendTarget {
  TransferId id;
  uint64_t epoch = 0;
  std::string transport;  // "tcp"
  std::string address;
  std::string token;
  std::string peer_worker_id;
  std::vector<int32_t> target_blocks;  // pool blocks at the receiver, by ordinal
};

class KvSender {
 public:
  static absl::StatusOr<std::unique_ptr<KvSender>> Start(KvSenderOptions options);
  virtual ~KvSender() = default;

  // Begins a transfer; connects to the peer in the background if there is no channel yet.
  // INVALID_ARGUMENT for an unknown transport or a malformed target. A target without blocks is
  // fine: Finish() seals it at once.
  virtual absl::Status Open(KvSendTarget target) = 0;
  // Queues one layer of some blocks: source_blocks[i] of the own pool -> ordinal ordinals[i]. Never
  // blocks and never fails: trouble comes out of on_done. The blocks must stay unchanged until
  // on_done.
  virtual void Push(const TransferId& id, uint64_t epoch, int layer,
                    std::span<const int32_t> source_blocks, std::span<const int32_t> ordinals) = 0;
  // All layers of all blocks have been pushed: send the digests.
  virtual void Finish(const TransferId& id, uint64_t epoch) = 0;
  // Send nothing more, tell the receiver quiet. Idempotent; unknown transfers are ignored.
  virtual void Abort(const TransferId& id, uint64_t epoch) = 0;
  // Measured over recent transfers to each peer: (worker id, bytes per second).
  virtual std::vector<std::pair<std::string, double>> LinkRates() const = 0;
};

}  // namespace tandem
