// How two processes of one host meet to share memory: a Unix socket with an unguessable name, over
// which descriptors are passed, between processes of the same user only.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <sys/types.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/transport/posix_fd.h"

namespace tandem::kvtransfer {

// Names this boot of this host; empty where it cannot be read.
std::string BootId();

struct RendezvousListener {
  Fd fd;
  std::string name;  // in the abstract namespace: gone with the socket, nothing to clean up
};
absl::StatusOr<RendezvousListener> ListenForPeer();

// A connected socket and who was found at its other end.
struct RendezvousPeer {
  Fd fd;
  pid_t pid = 0;
  // Readable once the peer's process is gone.
  Fd process;
};
// The peer that has connected already, or does within a moment. PERMISSION_DENIED for a process of
// another user; FAILED_PRECONDITION where its end could not be watched.
absl::StatusOr<RendezvousPeer> AcceptPeer(const RendezvousListener& listener);

// UNAVAILABLE where nobody listens, for instance in another network namespace; PERMISSION_DENIED
// for a listener of another user.
absl::StatusOr<Fd> ConnectToPeer(const std::string& name);

struct SharedPool {
  uint32_t version = 0;
  uint64_t pool_bytes = 0;
  std::array<int, 2> fds = {-1, -1};  // pool, control
};
// Passes the two descriptors, which stay the caller's.
absl::Status SendPool(int socket, const SharedPool& pool);
// How long a peer that was asked for its pool may take to pass it.
inline constexpr absl::Duration kPassTimeout = absl::Seconds(2);
// The descriptors of what is received are the caller's to close.
absl::StatusOr<SharedPool> ReceivePool(int socket, absl::Duration timeout);

}  // namespace tandem::kvtransfer
