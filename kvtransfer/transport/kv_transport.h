// KvTransport: the seam between channels, which know transfers, and the wires that carry bytes. One
// of the project's few interfaces, because tests need a faulty one and GPU links need others.
//
// A transport makes point-to-point connections, each a FIFO of frames (transport/frame.h) in both
// directions. It does not know tokens, epochs or digests; channels do.
//
// Two-sided transports (tcp) move a data frame's payload over the wire, and the receiving channel
// chooses where each byte goes with ReceiveSome(): nothing a sender says becomes an address.
//
// One-sided transports (CUDA IPC, shared memory) fit the same calls: KvPiece::target_offset says
// where in the receiver's pool a piece belongs, so Send() of a data frame writes the peer's memory
// itself (one gather kernel over all pieces) and then sends the header alone, with payload_bytes
// kept, through its control connection; the receiving end orders the writes before the header, and
// its ReceiveSome() reports the bytes as received without touching them. With such a transport a
// Cancel() at the receiver cannot stop a write under way, which is why blocks stay in quarantine
// until the sender says quiet or its connection is dead, whichever transport is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/transport/frame.h"

namespace tandem::kvtransfer {

// A contiguous part of a frame's payload at the sending end.
struct KvPiece {
  const std::byte* source = nullptr;
  size_t bytes = 0;
  // Bytes from the base of the receiver's pool; data frames only. Two-sided transports ignore it.
  uint64_t target_offset = 0;
};

using MutableBytes = std::span<std::byte>;

// One connection. Send() and Shutdown() are thread-safe; ReceiveHeader, ReceiveSome and
// WaitReadable belong to one reading thread at a time. Every wait is bounded by a timeout; a
// connection that returned an error other than DEADLINE_EXCEEDED from WaitReadable or ReceiveHeader
// is dead.
class KvConnection {
 public:
  virtual ~KvConnection() = default;

  // Sends one whole frame; frames of several threads do not interleave. `payload` adds up to
  // header.payload_bytes. Blocks while the peer takes nothing, at most `timeout` without progress:
  // then, and on every other failure, the connection is dead and UNAVAILABLE says why.
  virtual absl::Status Send(const FrameHeader& header, std::span<const KvPiece> payload,
                            absl::Duration timeout) = 0;

  // The next frame's header. Its payload must be taken with ReceiveSome before the next call.
  // DEADLINE_EXCEEDED after `timeout` (nothing was consumed, or the connection is dead),
  // UNAVAILABLE when the peer closed or vanished, and what DecodeHeader says of a malformed header.
  virtual absl::StatusOr<FrameHeader> ReceiveHeader(absl::Duration timeout) = 0;

  // Fills `into` (at most 64 spans) from the front with payload bytes that are already here;
  // returns how many, 0 if none. Never waits.
  virtual absl::StatusOr<size_t> ReceiveSome(std::span<const MutableBytes> into) = 0;
  // Waits until ReceiveSome has something, or the connection is dead. DEADLINE_EXCEEDED else.
  virtual absl::Status WaitReadable(absl::Duration timeout) = 0;

  // Ends the connection in both directions; calls that wait return UNAVAILABLE.
  virtual void Shutdown() = 0;
  // The peer's address, for logs.
  virtual const std::string& peer() const = 0;
};

// Thread-safe.
class KvListener {
 public:
  virtual ~KvListener() = default;
  // HOST:PORT that it is bound to.
  virtual const std::string& address() const = 0;
  // The next connection; UNAVAILABLE after Shutdown(), RESOURCE_EXHAUSTED when the process is out
  // of descriptors (try again), DEADLINE_EXCEEDED after `timeout`.
  virtual absl::StatusOr<std::unique_ptr<KvConnection>> Accept(absl::Duration timeout) = 0;
  virtual void Shutdown() = 0;
};

// Thread-safe.
class KvTransport {
 public:
  virtual ~KvTransport() = default;
  // As in KvSendTarget::transport and metrics: "tcp".
  virtual const std::string& name() const = 0;
  // Port 0 takes any free port. INVALID_ARGUMENT for a bad host, UNAVAILABLE for a port in use.
  virtual absl::StatusOr<std::unique_ptr<KvListener>> Listen(const std::string& host, int port) = 0;
  // INVALID_ARGUMENT for a malformed address; UNAVAILABLE or DEADLINE_EXCEEDED if it is not
  // reached.
  virtual absl::StatusOr<std::unique_ptr<KvConnection>> Dial(const std::string& address,
                                                             absl::Duration timeout) = 0;
};

// Receives exactly `into`, waiting at most `timeout` for each piece of progress.
absl::Status ReceiveAll(KvConnection* connection, MutableBytes into, absl::Duration timeout);

// Plain TCP over POSIX sockets. Lives as long as the process.
KvTransport* TcpTransport();

}  // namespace tandem::kvtransfer
