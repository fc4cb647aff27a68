// The connection between two workers: a FIFO of frames (transport/frame.h) in both directions. It
// carries everything that is said about transfers, whichever transport moves their bytes; it does
// not know tokens, epochs or digests. A seam, because tests need a faulty one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/pem.h"
#include "kvtransfer/transport/frame.h"

namespace tandem::kvtransfer {

using ConstBytes = std::span<const std::byte>;
using MutableBytes = std::span<std::byte>;

// Send(), Interrupt() and Shutdown() are thread-safe; ReceiveHeader, ReceiveSome and WaitReadable
// belong to one reading thread at a time. Every wait is bounded by a timeout; a connection that
// returned an error other than DEADLINE_EXCEEDED from WaitReadable or ReceiveHeader is dead.
class KvConnection {
 public:
  virtual ~KvConnection() = default;

  // Sends one whole frame; frames of several threads do not interleave. `payload` is what follows
  // the header: header.payload_bytes, or nothing for DATA whose bytes travel beside the connection.
  // Blocks while the peer takes nothing, at most `timeout` without progress: then, and on every
  // other failure, the connection is dead and UNAVAILABLE says why.
  virtual absl::Status Send(const FrameHeader& header, std::span<const ConstBytes> payload,
                            absl::Duration timeout) = 0;
  // Asked by a Send() that waits for the peer, on its thread, whenever Interrupt() comes; it must
  // not send. False: nobody wants the payload of this frame any more. Send() then returns CANCELLED
  // and reads it no more; the peer gets zeros in its place, so that the frames that follow are
  // understood. A frame without payload is sent whatever it says.
  virtual void SetStillWanted(std::function<bool()> /*still_wanted*/) {}

  // The next frame's header. A payload that follows it must be taken with ReceiveSome before the
  // next call. DEADLINE_EXCEEDED after `timeout` (nothing was consumed, or the connection is dead),
  // UNAVAILABLE when the peer closed or vanished, and what DecodeHeader says of a malformed header.
  virtual absl::StatusOr<FrameHeader> ReceiveHeader(absl::Duration timeout) = 0;

  // Fills `into` (at most 64 spans) from the front with payload bytes that are already here;
  // returns how many, 0 if none. Never waits.
  virtual absl::StatusOr<size_t> ReceiveSome(std::span<const MutableBytes> into) = 0;
  // Waits until ReceiveSome has something, or the connection is dead. DEADLINE_EXCEEDED else.
  virtual absl::Status WaitReadable(absl::Duration timeout) = 0;
  // As WaitReadable, but ends early, with OK, after an Interrupt(), which is remembered if nobody
  // waits.
  virtual absl::Status WaitReadableOrInterrupt(absl::Duration timeout) = 0;
  virtual void Interrupt() = 0;

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

// Makes connections. Thread-safe.
class KvNetwork {
 public:
  virtual ~KvNetwork() = default;
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
KvNetwork* TcpNetwork();
// TCP with TLS 1.3, where both ends show a certificate. `texts` says what to show and whose to
// believe; it is asked for each new connection, from any thread. Outlives what it made. The first
// Send or ReceiveHeader of a connection is also when its ends get to know each other:
// UNAUTHENTICATED says what is wrong with the other one.
std::unique_ptr<KvNetwork> MakeTlsNetwork(std::function<TlsTexts()> texts);

}  // namespace tandem::kvtransfer
