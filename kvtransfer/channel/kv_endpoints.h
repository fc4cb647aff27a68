// The two ends of a KV shipment as the worker loops see them. A prefill worker owns one KvSender, a
// decode worker one KvReceiver; between each pair of them there is one connection, on which
// transfers take turns. Which transport moves the bytes the two agree on when they connect.
//
// Life of a transfer
//   decode   KvReceiver::Expect(id, epoch, blocks) -> a token for the sender
//   prefill  KvSender::Open(target) ... Push(blocks, layer, ready) for every layer ... Finish() or
//            Abort()
//   decode   every layer of every block arrived and all digests match    -> on_sealed(id)
//            a digest differs, the connection dies, or the sender aborts -> on_failed(id, status)
//   both     sender will write nothing more for (id, epoch)              -> on_quiet(id)
// A receiver that gives up calls Cancel(id): later frames are dropped, counted and answered with an
// abort; its blocks go to quarantine until on_quiet.
//
// on_quiet comes exactly once for every expected transfer, and after on_sealed or on_failed: at
// once if the sender has said that it is done, or was never admitted. Else it waits until the
// sender says so or can write no more. Over tcp, where the receiver itself writes, that is the end
// of the connection; over a one-sided transport the sender's process must have detached or be gone,
// and a sender that is stopped keeps the blocks in quarantine for as long as it is.
//
// Protocol (docs/kv_transfer.md has the wire format, the state machines and a table of failures).
// Per peer: proof of the cluster secret both ways, HELLO both ways (version, shape of the pool,
// capability digest, transports; a mismatch is refused with a line that says what differs), the
// choice of a transport, a link self-test, then transfers: OPEN with the token that Expect()
// returned, DATA frames in any order, FINISH with one digest per block, RESULT back. QUIET or ABORT
// end a transfer early from either side. Everything a frame claims is checked before a byte is
// written; only a connection that opened a transfer with its token can write, and only to that
// transfer's blocks, each byte once. (A one-sided sender is trusted to keep to the blocks that it
// was granted: it is a process of the same user.)
//
// Thread-safe. Callbacks run on transport threads, without locks held; they must not block: they
// push to the worker's inbox. They may call the endpoint, but not destroy it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/base/kv_layout.h"
#include "common/base/kv_link.h"
#include "common/base/pem.h"
#include "common/base/ready_event.h"
#include "common/base/transfer_id.h"
#include "kvtransfer/channel/kv_counters.h"

namespace tandem {
class Metrics;
}  // namespace tandem

namespace tandem::kvtransfer {

class KvNetwork;
class KvStore;
class KvTransport;

// What a finished or failed transfer measured.
struct TransferStats {
  uint64_t bytes = 0;     // KV payload
  absl::Time first_byte;  // Clock::Real(), but in simulations
  absl::Time last_byte;
  std::string transport;  // that carried it: "tcp", "shm"
};

struct KvReceiverOptions {
  std::string listen_host =
      "127.0.0.1";  // address to bind and, unless advertise_host is set, to announce
  std::string advertise_host;
  int port = 0;                  // 0: any free port
  KvRegion region;               // the pool
  std::vector<KvRegion> shards;  // or, where it lies in pieces, these, in the order of their heads
  std::string worker_id;
  std::string cluster_secret;  // senders must prove it, before they say anything else
  // Certificates of the cluster, as they are now; asked for each connection, from any thread. Both
  // ends have them, or none does: then what goes between them is not encrypted.
  std::function<TlsTexts()> tls;
  std::string capability_digest;  // and present the same of this
  // What to offer, as ParseTransports (transport/kv_transport.h) reads it.
  std::string transports = "auto";
  std::function<void(const TransferId&, uint64_t epoch, const TransferStats&)> on_sealed;
  // DATA_LOSS: digests differ or pieces are missing. UNAVAILABLE: the connection died. ABORTED: the
  // sender gave up. CANCELLED: this receiver was closed.
  std::function<void(const TransferId&, uint64_t epoch, const absl::Status&)> on_failed;
  // Nothing writes the transfer's blocks any more. Once for each, after on_sealed or on_failed.
  std::function<void(const TransferId&, uint64_t epoch)> on_quiet;

  // Memory of the host for each connection over shm_ring: the pages between two cards.
  size_t ring_bytes = size_t{64} << 20;

  // A connection that has not proved the secret by then is closed, and one that has not opened a
  // transfer with a right token so long after that; whatever it sends meanwhile.
  absl::Duration auth_timeout = absl::Seconds(5);
  // Connections that have not proved the secret yet. Where there are more the oldest goes: a worker
  // proves it in a moment, so strangers who hold theirs keep nobody out.
  int max_strangers = 64;
  // A sender that stops inside a frame for so long is dead.
  absl::Duration io_timeout = absl::Seconds(20);
  // From FINISH until pieces that are still missing count as lost.
  absl::Duration incomplete_timeout = absl::Seconds(2);
  // From Cancel until a sender that does not say quiet has its connection closed.
  absl::Duration quiet_timeout = absl::Seconds(10);
  int max_connections = 256;   // of workers
  Metrics* metrics = nullptr;  // not owned; exports the counters if given
  // For simulations, not owned: the time of what has no thread of its own (transfers, not links).
  Clock* clock = Clock::Real();
  // For tests, not owned. nullptr: TCP, and the store over `region`.
  KvNetwork* network = nullptr;
  const KvStore* store = nullptr;
};

class KvReceiver {
 public:
  // INVALID_ARGUMENT names a bad option; UNAVAILABLE if it cannot listen.
  static absl::StatusOr<std::unique_ptr<KvReceiver>> Start(KvReceiverOptions options);
  // Closes all connections; what is not over fails (on_failed CANCELLED, on_quiet). Callbacks have
  // ended when it returns. A one-sided writer gets a moment to detach; the pool's memory should not
  // be used again afterwards, for a writer that is stopped may still have it mapped.
  virtual ~KvReceiver() = default;

  // HOST:PORT that senders dial.
  virtual const std::string& address() const = 0;
  // From now on a sender may write `blocks` of the pool under (id, epoch). `blocks[i]` is named by
  // ordinal i on the wire. Returns the token to hand to the sender. ALREADY_EXISTS for a known (id,
  // epoch); INVALID_ARGUMENT for a block out of range or named twice; FAILED_PRECONDITION for a
  // block that another transfer may still write (it is not quiet yet).
  // `sender`: the worker id that must be proved by whoever opens it; empty: any of the cluster.
  virtual absl::StatusOr<std::string> Expect(const TransferId& id, uint64_t epoch,
                                             std::vector<int32_t> blocks,
                                             const std::string& sender) = 0;
  // Over tcp no byte is written for (id, epoch) once this has returned, and over a one-sided
  // transport none once on_quiet has come: the blocks may be reused only then. Waits at most for
  // the copy of what one read took from the socket (under 1 MiB), never for the peer. Idempotent;
  // on_sealed and on_failed no longer come.
  virtual void Cancel(const TransferId& id, uint64_t epoch) = 0;
  // KV payload that has arrived so far; 0 for an unknown transfer.
  virtual uint64_t BytesArrived(const TransferId& /*id*/, uint64_t /*epoch*/) const { return 0; }
  virtual KvTransferCounters Counters() const { return {}; }
};

struct KvSenderOptions {
  KvRegion region;               // the pool
  std::vector<KvRegion> shards;  // or, where it lies in pieces, these, in the order of their heads
  std::string worker_id;
  std::string cluster_secret;  // proved to receivers, who must prove it too
  // Certificates of the cluster, as they are now; asked for each connection, from any thread. Both
  // ends have them, or none does: then what goes between them is not encrypted.
  std::function<TlsTexts()> tls;
  std::string capability_digest;
  // What to use, as ParseTransports reads it: the first that the peer offers and that works.
  std::string transports = "auto";
  absl::Duration connect_timeout = absl::Seconds(5);
  absl::Duration io_timeout = absl::Seconds(20);  // a peer that takes nothing for so long is dead
  // All bytes were handed to the peer and acknowledged, or the transfer failed, or was aborted: the
  // source blocks may be released. Exactly once per Open. OK: the receiver sealed it.
  std::function<void(const TransferId&, uint64_t epoch, const absl::Status&, const TransferStats&)>
      on_done;

  // A link below this many bytes per second is warned of, once, and counted; negative: what its
  // transport should reach.
  double slow_link_bytes_per_second = -1;
  // A link whose self-test finds less than this is refused, or only warned of; 0: none is.
  double min_link_bytes_per_second = 0;
  bool refuse_slow_links = true;
  // So long Links() calls a link refused; then others are to try it again, for what was in its way
  // may have gone.
  absl::Duration refused_for = absl::Minutes(1);
  // What the self-test of a new link may take to measure rates and latency; zero: only its pattern
  // is checked.
  absl::Duration link_test_time = absl::Milliseconds(200);
  int max_peers = 1024;
  Metrics* metrics = nullptr;  // not owned; exports the counters if given
  // For tests, not owned. nullptr: TCP, and the store over `region`.
  KvNetwork* network = nullptr;
  const KvStore* store = nullptr;
};

struct KvSendTarget {
  TransferId id;
  uint64_t epoch = 0;
  std::string transport;  // what the receiver offers, as its options say it: "auto", "tcp", ...
  std::string address;
  std::string token;
  std::string peer_worker_id;          // if not empty, the peer must present it
  std::vector<int32_t> target_blocks;  // pool blocks at the receiver, by ordinal
};

class KvSender {
 public:
  // INVALID_ARGUMENT names a bad option.
  static absl::StatusOr<std::unique_ptr<KvSender>> Start(KvSenderOptions options);
  // Fails what is not done (on_done CANCELLED). Callbacks have ended when it returns.
  virtual ~KvSender() = default;

  // Begins a transfer; connects to the peer in the background if there is no connection yet.
  // INVALID_ARGUMENT for a malformed target, or one that offers no transport that this end uses. A
  // target without blocks is fine: Finish() seals it at once. ALREADY_EXISTS for a transfer that is
  // not done; RESOURCE_EXHAUSTED beyond max_peers.
  virtual absl::Status Open(KvSendTarget target) = 0;
  // Queues one layer of some blocks: source_blocks[i] of the own pool -> ordinal ordinals[i]. They
  // are read once `ready` is true; nullptr: they are ready now. Never blocks and never fails:
  // trouble comes out of on_done. The blocks must stay unchanged until on_done. What was pushed
  // before is not sent again.
  virtual void Push(const TransferId& id, uint64_t epoch, int layer,
                    std::span<const int32_t> source_blocks, std::span<const int32_t> ordinals,
                    std::shared_ptr<const ReadyEvent> ready) = 0;
  void Push(const TransferId& id, uint64_t epoch, int layer, std::span<const int32_t> source_blocks,
            std::span<const int32_t> ordinals) {
    Push(id, epoch, layer, source_blocks, ordinals, nullptr);
  }
  // All layers of all blocks have been pushed: send the digests.
  virtual void Finish(const TransferId& id, uint64_t epoch) = 0;
  // Send nothing more, tell the receiver quiet if it has heard of the transfer. Idempotent; unknown
  // transfers are ignored. May call on_done itself.
  virtual void Abort(const TransferId& id, uint64_t epoch) = 0;
  // One digest per block of the own pool, over all of its bytes, by the rule of FINISH. The blocks
  // must be computed. Reads them on the caller's thread.
  virtual std::vector<uint64_t> Digest(std::span<const int32_t> blocks) const = 0;
  // What is known of the ways to peers that it has connected to, by worker id.
  virtual std::map<std::string, KvLink> Links() const = 0;
  virtual KvTransferCounters Counters() const { return {}; }
};

}  // namespace tandem::kvtransfer
