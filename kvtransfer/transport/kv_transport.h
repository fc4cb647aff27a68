// KvTransport: the seam between channels, which know transfers, and what moves their bytes from one
// pool into another. docs/add_a_transport.md says how to write one.
//
//  - register: KvTransport::Register(store), at both ends and once: what of the pool can be reached
//  - offer: KvRegistration::Offer(), at the receiver and per connection: how to reach it
//  - connect: KvRegistration::Connect() and KvOffer::Accept() make the two ends of a pair
//  - post: KvWriter::Post() and KvReader::Receive() begin to move one run of blocks
//  - poll: KvPost::Done() and Reception::Done() say that it has ended
//  - release: ~KvPost and KvWriter::Detach()
//  - probe: KvWriter::Probe() and KvReader::Probe(), before the first post: the link's self-test
//
// A KvConnection lies beside every pair: what is said about transfers (open, finish, quiet, abort)
// goes over it, and so does the header of each DATA frame, in the order of Post(). Two-sided
// transports send the header first and the receiving end posts its receive when it sees it, in the
// order of the headers; one-sided ones write the peer's pool and then send the header, which says
// that the bytes are there.
//
// What a transport promises beyond "the bytes arrive, or an error" are its capabilities. The
// channel, not the transport, checks digests.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/store/kv_store.h"
#include "kvtransfer/transport/kv_connection.h"

namespace tandem::kvtransfer {

struct KvCapabilities {
  // The sender writes the receiver's pool itself. Nothing at the receiver can stop a write that is
  // under way, so a transfer is acknowledged before its first byte (grants), and a lost connection
  // does not mean that the peer writes nothing more (KvReader::WriterGone).
  bool one_sided = false;
  // The receiver decides for every byte, until it is in the pool, whether it is still wanted.
  bool cancellable = false;
  bool same_host = false;    // both ends run on one host
  bool host_memory = false;  // pools it can read and write without staging by the channel
  bool device_memory = false;
  size_t frame_bytes = 0;  // about so much should be posted at a time; 0: what the store says
  // Below this a link is reported as slow.
  double expected_bytes_per_second = 0;
};

// From here on the bytes of a frame take longer than to wake a thread does.
inline constexpr uint64_t kSmallFrameBytes = uint64_t{1} << 20;

inline constexpr size_t kDefaultRingBytes = size_t{64} << 20;
struct LinkTimeouts {
  absl::Duration connect = absl::Seconds(5);
  absl::Duration io = absl::Seconds(20);  // without any progress
  // No time, but what else a link is told: memory of a ring between two processes (shm_ring).
  size_t ring_bytes = kDefaultRingBytes;
  bool encrypted = false;  // the connection is TLS: no bytes leave the host in the clear
};

// A run of blocks on its way. Destroying it waits until the transport no longer reads the source.
class KvPost {
 public:
  virtual ~KvPost() = default;
  // True once the source may be reused and status() and digests() are known. Never blocks; the
  // transport interrupts the connection when a post that was not done becomes so.
  virtual bool Done() = 0;
  // CANCELLED: the receiver revoked the grant and not all was written. Any other error ends the
  // connection.
  virtual const absl::Status& status() const = 0;
  // One per block of the run, over the run's heads, of the bytes that were read.
  virtual std::span<const uint64_t> digests() const = 0;
  // Nobody wants it any more: what has not begun need not. It is done CANCELLED then, at once.
  virtual void Abandon() {}
};

// What a self-test may have under way.
struct ProbeRoom {
  size_t frame_bytes = 0;  // of one PROBE, at most
  size_t frames = 0;       // that have not been acknowledged
};

// The sending end of a pair. Belongs to one thread.
class KvWriter {
 public:
  virtual ~KvWriter() = default;
  // Sends `run` of the own pool, whose target blocks are of the peer's, and `header` over the
  // connection. `grant` is what the receiver answered to OPEN; empty unless one-sided.
  virtual absl::StatusOr<std::unique_ptr<KvPost>> Post(const FrameHeader& header,
                                                       const BlockRun& run,
                                                       const std::string& grant) = 0;
  // For the self-test of the link, before the first Post(): moves header.payload_bytes the way that
  // blocks go, into memory that is no pool's, and sends `header`, a PROBE. The bytes are `pattern`;
  // where that is empty (header.code 0), whatever is fastest to hand.
  virtual absl::Status Probe(FrameHeader header, ConstBytes pattern) = 0;
  virtual ProbeRoom probe_room() const = 0;
  // The connection has ended: what is under way waits for the peer no longer.
  virtual void Stop() {}
  // Tells the receiver, even if the connection is dead, that nothing is written any more. Called
  // after the last post was released. Idempotent.
  virtual void Detach() {}
};

// A part of a DATA frame's payload, in the order of the payload.
struct TargetPiece {
  uint64_t target_offset = 0;
  uint64_t bytes = 0;
  bool wanted = false;  // if not: there already, or the transfer is not open; goes nowhere
};

// Where a DATA frame's payload goes; made by the channel for each frame.
class Reception {
 public:
  virtual ~Reception() = default;
  virtual std::vector<TargetPiece>& pieces() = 0;
  // Runs `write`, which writes some wanted pieces and does not wait, if the transfer may still be
  // written; else returns false, and nothing of this frame is wanted any more.
  virtual bool WriteGuarded(absl::FunctionRef<void()> write) = 0;
  // The wanted bytes are in the pool, unless WriteGuarded said no. Once, from any thread.
  virtual void Done() = 0;
};

// The receiving end of a pair. Receive() belongs to the connection's reading thread; everything
// else is thread-safe. Outlives the connection while a transfer needs it.
class KvReader {
 public:
  virtual ~KvReader() = default;
  // Takes the payload of the DATA frame whose header was just received. May return before
  // `reception` is done: the next Receive() may come before that. An error ends the connection;
  // Done() is not called then, and need not be for a frame that has come before.
  virtual absl::Status Receive(const FrameHeader& header, std::shared_ptr<Reception> reception) = 0;

  // Takes what the PROBE brought whose header was just received, before the first OPEN. Its
  // PayloadDigest() if header.code is 1, else 0.
  virtual absl::StatusOr<uint64_t> Probe(const FrameHeader& header) = 0;

  // One-sided transports only. A grant lets the peer write until it is revoked; the peer looks
  // before every piece. It may write one piece more after Revoke(), and is known to have stopped
  // when it says QUIET, or WriterGone(). Release() gives the grant back; only then.
  virtual absl::StatusOr<std::string> Grant() { return std::string(); }
  virtual void Revoke(const std::string& /*grant*/) {}
  virtual void Release(const std::string& /*grant*/) {}
  // The connection has ended: no reception is called any more once this has returned. On the
  // connection's reading thread.
  virtual void Stop() {}
  // True once the peer can write nothing more, whatever it does: it has detached, or its process is
  // gone. Asked only after the connection has ended.
  virtual bool WriterGone() { return true; }
};

// What a receiver offers on one connection.
class KvOffer {
 public:
  virtual ~KvOffer() = default;
  // For the peer's Connect(): at most kMaxAdvertBytes, not secret.
  virtual const std::string& advert() const = 0;
  // The peer has selected this offer, with what its Connect() had to say. Waits for it at most a
  // moment: it is there already.
  virtual absl::StatusOr<std::shared_ptr<KvReader>> Accept(KvConnection* connection,
                                                           const std::string& note) = 0;
};
inline constexpr size_t kMaxAdvertBytes = 256;

// Tells the peer to accept, with a note of at most kMaxSelectNote bytes for it, and waits until it
// has.
using SelectPeer = absl::FunctionRef<absl::Status(const std::string& note)>;
inline constexpr size_t kMaxSelectNote = 512;

// A pool as one transport reaches it.
class KvRegistration {
 public:
  virtual ~KvRegistration() = default;
  // FAILED_PRECONDITION where this pool cannot be offered.
  virtual absl::StatusOr<std::unique_ptr<KvOffer>> Offer() = 0;
  // Reaches the peer that made `advert`; calls `select` once it is there. UNAVAILABLE where the two
  // cannot be joined by this transport.
  virtual absl::StatusOr<std::unique_ptr<KvWriter>> Connect(KvConnection* connection,
                                                            const std::string& advert,
                                                            const KvPoolShape& peer,
                                                            SelectPeer select) = 0;
};

// Thread-safe; lives as long as the process.
class KvTransport {
 public:
  virtual ~KvTransport() = default;
  // In flags, hellos, timing and metrics: "tcp".
  virtual const std::string& name() const = 0;
  virtual const KvCapabilities& capabilities() const = 0;
  // `store` outlives the registration.
  virtual absl::StatusOr<std::unique_ptr<KvRegistration>> Register(
      const KvStore* store, const LinkTimeouts& timeouts) = 0;
};

// The bytes follow their header over the connection.
KvTransport* TcpTransport();
// The sender maps the receiver's pool and writes it.
KvTransport* ShmTransport();
// Through a ring in memory of the host that both map, which a card of either end reaches.
KvTransport* ShmRingTransport();
// The same in the memory of cards, which write each other's.
KvTransport* CudaIpcTransport();
// Through a FIFO between the memory of two cards, of one host or of two: NCCL.
KvTransport* NcclTransport();

// All that this build has, best first.
const std::vector<KvTransport*>& KnownTransports();
// What --kv-transport says: "auto" (all but nccl, best first) or names separated by commas, in
// order of preference; "shm" is both shm, between pools of the host, and shm_ring, for others. nccl
// has to be named: its connections prove nothing to each other, encrypt nothing, and need ports of
// their own. INVALID_ARGUMENT names the unknown one and those there are.
absl::StatusOr<std::vector<KvTransport*>> ParseTransports(const std::string& text);

// A post that is done when it is made: of transports whose Post() does the work.
std::unique_ptr<KvPost> CompletedPost(absl::Status status, std::vector<uint64_t> digests);

}  // namespace tandem::kvtransfer
