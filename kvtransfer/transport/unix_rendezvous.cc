#include "kvtransfer/transport/unix_rendezvous.h"

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>
#include <utility>

#include "common/base/file.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"

namespace tandem::kvtransfer {
namespace {

constexpr absl::Duration kAcceptTimeout = absl::Seconds(2);

// What travels beside the descriptors.
struct PoolMessage {
  uint32_t magic = 0x4d535654;  // "TVSM"
  uint32_t version = 0;
  uint64_t pool_bytes = 0;
};

absl::StatusOr<sockaddr_un> AbstractAddress(const std::string& name, socklen_t* length) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (name.empty() || name.size() + 1 > sizeof(address.sun_path)) {
    return InvalidArgument("a socket name of {} bytes", name.size());
  }
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

absl::StatusOr<Fd> NewSocket() {
  Fd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return ResourceExhausted("socket: {}", ErrnoText(errno));
  return fd;
}

// The credentials are those of the moment when the peer connected, or listened.
absl::StatusOr<ucred> CredentialsOfPeer(int fd) {
  ucred peer = {};
  socklen_t length = sizeof(peer);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) {
    return Internal("SO_PEERCRED: {}", ErrnoText(errno));
  }
  if (peer.uid != geteuid()) {
    return absl::PermissionDeniedError(
        fmt::format("the peer runs as user {}, this process as {}", peer.uid, geteuid()));
  }
  return peer;
}

}  // namespace

std::string BootId() {
  absl::StatusOr<std::string> text = ReadFile("/proc/sys/kernel/random/boot_id");
  if (!text.ok()) return "";
  while (!text->empty() && text->back() == '\n') text->pop_back();
  return *std::move(text);
}

absl::StatusOr<RendezvousListener> ListenForPeer() {
  RendezvousListener listener;
  TANDEM_ASSIGN_OR_RETURN(listener.fd, NewSocket());
  listener.name = "tandem-kv-" + TransferId::Random().ToHex();
  socklen_t length = 0;
  TANDEM_ASSIGN_OR_RETURN(const sockaddr_un address, AbstractAddress(listener.name, &length));
  if (bind(listener.fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      listen(listener.fd.get(), 1) != 0) {
    return Unavailable("cannot listen on a Unix socket: {}", ErrnoText(errno));
  }
  return listener;
}

absl::StatusOr<RendezvousPeer> AcceptPeer(const RendezvousListener& listener) {
  TANDEM_RETURN_IF_ERROR(Poll(listener.fd.get(), POLLIN, kAcceptTimeout));
  RendezvousPeer peer;
  peer.fd = Fd(accept4(listener.fd.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!peer.fd.valid()) return Unavailable("accept: {}", ErrnoText(errno));
  TANDEM_ASSIGN_OR_RETURN(const ucred credentials, CredentialsOfPeer(peer.fd.get()));
  peer.pid = credentials.pid;
  peer.process = Fd(static_cast<int>(syscall(SYS_pidfd_open, peer.pid, 0)));
  if (!peer.process.valid()) {
    // Another process namespace, or an old kernel: its end would never be known.
    return FailedPrecondition("process {} cannot be watched: {}", peer.pid, ErrnoText(errno));
  }
  // The number may have passed to another process before it was opened, but then the peer's end of
  // the socket is closed.
  pollfd entry = {peer.fd.get(), POLLIN, 0};
  if (poll(&entry, 1, 0) > 0) return Unavailable("the peer is gone already");
  return peer;
}

absl::StatusOr<Fd> ConnectToPeer(const std::string& name) {
  TANDEM_ASSIGN_OR_RETURN(Fd fd, NewSocket());
  socklen_t length = 0;
  TANDEM_ASSIGN_OR_RETURN(const sockaddr_un address, AbstractAddress(name, &length));
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    return Unavailable("cannot reach the peer's Unix socket: {}", ErrnoText(errno));
  }
  TANDEM_RETURN_IF_ERROR(CredentialsOfPeer(fd.get()).status());
  return fd;
}

absl::Status SendPool(int socket, const SharedPool& pool) {
  PoolMessage message;
  message.version = pool.version;
  message.pool_bytes = pool.pool_bytes;
  iovec part = {&message, sizeof(message)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(pool.fds))] = {};
  msghdr header = {};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  cmsghdr* rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(pool.fds));
  std::memcpy(CMSG_DATA(rights), pool.fds.data(), sizeof(pool.fds));
  if (sendmsg(socket, &header, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(message))) {
    return Unavailable("passing the KV pool's descriptor: {}", ErrnoText(errno));
  }
  return absl::OkStatus();
}

absl::StatusOr<SharedPool> ReceivePool(int socket, absl::Duration timeout) {
  TANDEM_RETURN_IF_ERROR(Poll(socket, POLLIN, timeout));
  SharedPool pool;
  PoolMessage message;
  iovec part = {&message, sizeof(message)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(pool.fds))] = {};
  msghdr header = {};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  const ssize_t n = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
  if (n < 0) return Unavailable("receiving the KV pool's descriptor: {}", ErrnoText(errno));
  const cmsghdr* rights = CMSG_FIRSTHDR(&header);
  if (rights == nullptr || rights->cmsg_type != SCM_RIGHTS ||
      rights->cmsg_len != CMSG_LEN(sizeof(pool.fds))) {
    return Unavailable("the peer passed no descriptors");
  }
  std::memcpy(pool.fds.data(), CMSG_DATA(rights), sizeof(pool.fds));
  pool.version = message.version;
  pool.pool_bytes = message.pool_bytes;
  if (n != static_cast<ssize_t>(sizeof(message)) || message.magic != PoolMessage().magic) {
    for (const int fd : pool.fds) close(fd);
    return InvalidArgument("a malformed message beside the KV pool's descriptors");
  }
  return pool;
}

}  // namespace tandem::kvtransfer
