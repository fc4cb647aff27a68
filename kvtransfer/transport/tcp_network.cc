// KvNetwork over TCP: non-blocking sockets, poll() for every wait. With certificates what passes
// through a socket is that of a TlsStream; nothing else differs.
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/base/tls_stream.h"
#include "kvtransfer/transport/kv_connection.h"
#include "kvtransfer/transport/posix_fd.h"

namespace tandem::kvtransfer {
namespace {

constexpr int kSocketBufferBytes = 4 << 20;  // the kernel caps it at net.core.{r,w}mem_max
constexpr size_t kMaxVectors = 64;           // spans of one system call
// What goes out in place of a payload that nobody wants any more.
constexpr std::array<std::byte, 64 << 10> kZeros = {};
// Rest of a header after its first byte: sent in one piece, so only a broken peer takes long.
constexpr absl::Duration kHeaderTimeout = absl::Seconds(5);
// A host that vanished (no FIN, no RST) is noticed after about this long, idle or sending.
constexpr int kKeepIdleSeconds = 5;
constexpr int kKeepIntervalSeconds = 2;
constexpr int kKeepCount = 3;
constexpr unsigned kUserTimeoutMs = 11000;
// A thread that sleeps takes tens of microseconds to wake, and a small transfer is a handful of
// frames to and fro. So who waits for a frame looks again and again for so long after the last one,
// where a processor can be spared for it.
constexpr absl::Duration kLookOut = absl::Microseconds(100);
constexpr unsigned kSparesAProcessor = 8;  // a host of so many

void SetOption(int fd, int level, int name, int value) {
  // Tuning only: a kernel that refuses one still carries frames.
  (void)setsockopt(fd, level, name, &value, sizeof(value));
}

void TuneConnection(int fd) {
  SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  SetOption(fd, SOL_SOCKET, SO_SNDBUF, kSocketBufferBytes);
  SetOption(fd, SOL_SOCKET, SO_RCVBUF, kSocketBufferBytes);
  SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdleSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepIntervalSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepCount);
  const unsigned user_timeout = kUserTimeoutMs;
  (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &user_timeout, sizeof(user_timeout));
}

std::string AddressText(const sockaddr* address, socklen_t length) {
  char host[NI_MAXHOST];
  char port[NI_MAXSERV];
  if (getnameinfo(address, length, host, sizeof(host), port, sizeof(port),
                  NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "?";
  }
  const bool v6 = std::strchr(host, ':') != nullptr;
  return fmt::format("{}{}{}:{}", v6 ? "[" : "", host, v6 ? "]" : "", port);
}

struct AddrinfoFree {
  void operator()(addrinfo* list) const { freeaddrinfo(list); }
};
using AddrinfoPtr = std::unique_ptr<addrinfo, AddrinfoFree>;

absl::StatusOr<AddrinfoPtr> Resolve(const std::string& host, int port, bool passive) {
  addrinfo hints = {};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0);
  addrinfo* list = nullptr;
  const int error = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &list);
  if (error != 0) return InvalidArgument("cannot resolve {}: {}", host, gai_strerror(error));
  return AddrinfoPtr(list);
}

class TcpConnection : public KvConnection {
 public:
  // `tls` is over the same descriptor; null: none.
  TcpConnection(Fd fd, std::string peer, std::unique_ptr<TlsStream> tls)
      : fd_(std::move(fd)),
        interrupt_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
        peer_(std::move(peer)),
        tls_(std::move(tls)) {
    TuneConnection(fd_.get());
  }

  absl::Status Send(const FrameHeader& header, std::span<const ConstBytes> payload,
                    absl::Duration timeout) override {
    const EncodedHeader encoded = EncodeHeader(header);
    absl::MutexLock lock(&send_mutex_);
    if (send_failed_) return Unavailable("connection to {} is closed", peer_);
    interrupted_ = false;
    absl::Status status = GetToKnow(timeout);
    if (status.ok()) status = SendOwed(timeout);
    if (status.ok()) status = SendFrame(encoded, payload, timeout);
    NoteFrame();
    // Others may have meant their interrupt for who waits to read.
    if (interrupted_) Interrupt();
    if (!status.ok() && !absl::IsCancelled(status)) {
      // Part of the frame may be out: nothing that follows would be understood.
      send_failed_ = true;
      Shutdown();
    }
    return status;
  }

  void SetStillWanted(std::function<bool()> still_wanted) override {
    absl::MutexLock lock(&send_mutex_);
    still_wanted_ = std::move(still_wanted);
  }

  absl::StatusOr<FrameHeader> ReceiveHeader(absl::Duration timeout) override {
    TANDEM_RETURN_IF_ERROR(GetToKnow(timeout));
    std::array<std::byte, kFrameHeaderBytes> bytes;
    size_t have = 0;
    while (have < bytes.size()) {
      const MutableBytes rest(bytes.data() + have, bytes.size() - have);
      TANDEM_ASSIGN_OR_RETURN(const size_t n, ReceiveSome({&rest, 1}));
      have += n;
      if (n > 0) continue;
      absl::Status status = WaitReadable(have == 0 ? timeout : kHeaderTimeout);
      if (status.ok()) continue;
      if (have == 0) return status;
      Shutdown();
      return Unavailable("{} stopped inside a frame header", peer_);
    }
    return DecodeHeader(bytes);
  }

  absl::StatusOr<size_t> ReceiveSome(std::span<const MutableBytes> into) override {
    iovec vectors[kMaxVectors];
    const size_t count = std::min(into.size(), kMaxVectors);
    for (size_t i = 0; i < count; ++i) vectors[i] = {into[i].data(), into[i].size()};
    if (tls_ != nullptr) {
      const absl::StatusOr<size_t> n = tls_->Receive({vectors, count});
      if (n.ok() && *n > 0) NoteFrame();
      return n;
    }
    msghdr message = {};
    message.msg_iov = vectors;
    message.msg_iovlen = count;
    while (true) {
      const ssize_t n = recvmsg(fd_.get(), &message, MSG_DONTWAIT);
      if (n > 0) {
        NoteFrame();
        return static_cast<size_t>(n);
      }
      if (n == 0) return Unavailable("{} closed the connection", peer_);
      if (errno == EAGAIN || errno == EWOULDBLOCK) return size_t{0};
      if (errno != EINTR) return Unavailable("receiving from {}: {}", peer_, ErrnoText(errno));
    }
  }

  absl::Status WaitReadable(absl::Duration timeout) override {
    pollfd entry = {fd_.get(), POLLIN, 0};
    return AwaitReadable({&entry, 1}, timeout);
  }

  absl::Status WaitReadableOrInterrupt(absl::Duration timeout) override {
    pollfd entries[2] = {{fd_.get(), POLLIN, 0}, {interrupt_.get(), POLLIN, 0}};
    absl::Status status = AwaitReadable(entries, timeout);
    uint64_t count = 0;
    if (entries[1].revents != 0) (void)!read(interrupt_.get(), &count, sizeof(count));
    return status;
  }

  void Interrupt() override {
    const uint64_t one = 1;
    (void)!write(interrupt_.get(), &one, sizeof(one));
  }

  void Shutdown() override { (void)shutdown(fd_.get(), SHUT_RDWR); }
  const std::string& peer() const override { return peer_; }

 private:
  absl::Status GetToKnow(absl::Duration timeout) {
    return tls_ == nullptr ? absl::OkStatus() : tls_->Handshake(timeout);
  }

  void NoteFrame() {
    last_frame_.store(absl::ToUnixNanos(Clock::Real()->Now()), std::memory_order_relaxed);
  }

  absl::Status AwaitReadable(std::span<pollfd> entries, absl::Duration timeout) const {
    if (tls_ != nullptr && tls_->HasInput()) return absl::OkStatus();
    static const bool looks_out = std::thread::hardware_concurrency() >= kSparesAProcessor;
    if (looks_out && timeout > absl::ZeroDuration()) {
      const absl::Time end =
          absl::FromUnixNanos(last_frame_.load(std::memory_order_relaxed)) + kLookOut;
      while (Clock::Real()->Now() < end) {
        if (poll(entries.data(), entries.size(), 0) > 0) return absl::OkStatus();
      }
    }
    return Poll(entries, timeout);
  }

  // What is not out yet of a frame: of part -1, its header, or of its payload `skip` bytes are.
  struct Progress {
    ptrdiff_t part = -1;
    size_t skip = 0;
  };

  // CANCELLED: the payload was given up.
  absl::Status SendFrame(ConstBytes header, std::span<const ConstBytes> payload,
                         absl::Duration timeout) ABSL_EXCLUSIVE_LOCKS_REQUIRED(send_mutex_) {
    Progress out;
    absl::Status status = SendAll(header, payload, timeout, &out);
    const bool begun = out.part >= 0 || out.skip > 0;
    if (!absl::IsCancelled(status) || !begun) return status;
    if (out.part < 0) {
      const ConstBytes rest = header.subspan(std::exchange(out.skip, 0));
      owed_header_.assign(rest.begin(), rest.end());
      out.part = 0;
    }
    for (const ConstBytes& part : payload.subspan(static_cast<size_t>(out.part))) {
      owed_bytes_ += part.size();
    }
    owed_bytes_ -= out.skip;
    return status;
  }

  // The rest of a frame that was given up.
  absl::Status SendOwed(absl::Duration timeout) ABSL_EXCLUSIVE_LOCKS_REQUIRED(send_mutex_) {
    while (owed_bytes_ > 0) {
      const std::vector<std::byte> header = std::exchange(owed_header_, {});
      const ConstBytes zeros = ConstBytes(kZeros).first(std::min(owed_bytes_, kZeros.size()));
      Progress out;
      TANDEM_RETURN_IF_ERROR(SendAll(header, {&zeros, 1}, timeout, &out, /*may_give_up=*/false));
      owed_bytes_ -= zeros.size();
    }
    return absl::OkStatus();
  }

  absl::Status SendAll(ConstBytes header, std::span<const ConstBytes> payload,
                       absl::Duration timeout, Progress* out, bool may_give_up = true)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(send_mutex_) {
    const auto end = static_cast<ptrdiff_t>(payload.size());
    while (out->part < end) {
      iovec vectors[kMaxVectors];
      size_t count = 0;
      for (ptrdiff_t i = out->part; i < end && count < kMaxVectors; ++i) {
        const ConstBytes part = i < 0 ? header : payload[static_cast<size_t>(i)];
        const size_t done = i == out->part ? out->skip : 0;
        vectors[count++] = {const_cast<std::byte*>(part.data()) + done, part.size() - done};
      }
      TANDEM_ASSIGN_OR_RETURN(size_t sent, SendSome({vectors, count}));
      if (sent == 0) {
        TANDEM_RETURN_IF_ERROR(AwaitWritable(timeout, may_give_up && !payload.empty()));
        continue;
      }
      for (size_t i = 0; i < count; ++i) {
        if (sent < vectors[i].iov_len) {
          out->skip = (i == 0 ? out->skip : 0) + sent;
          break;
        }
        sent -= vectors[i].iov_len;
        ++out->part;
        if (i + 1 == count) out->skip = 0;
      }
    }
    while (tls_ != nullptr) {
      TANDEM_ASSIGN_OR_RETURN(const bool sent, tls_->Flush());
      if (sent) break;
      TANDEM_RETURN_IF_ERROR(AwaitWritable(timeout, /*may_give_up=*/false));
    }
    return absl::OkStatus();
  }

  // How many bytes were taken; 0: none now.
  absl::StatusOr<size_t> SendSome(std::span<iovec> vectors)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(send_mutex_) {
    if (tls_ != nullptr) return tls_->Send(vectors);
    msghdr message = {};
    message.msg_iov = vectors.data();
    message.msg_iovlen = vectors.size();
    while (true) {
      const ssize_t n = sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n >= 0) return static_cast<size_t>(n);
      if (errno == EAGAIN || errno == EWOULDBLOCK) return size_t{0};
      if (errno != EINTR) return Unavailable("sending to {}: {}", peer_, ErrnoText(errno));
    }
  }

  absl::Status AwaitWritable(absl::Duration timeout, bool may_give_up)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(send_mutex_) {
    // An interrupt that came while the rest of another frame went out is not heard again.
    if (interrupted_ && may_give_up && !still_wanted_()) return Cancelled("given up");
    const absl::Time deadline = Clock::Real()->Now() + timeout;
    while (true) {
      pollfd entries[2] = {{fd_.get(), POLLOUT, 0}, {interrupt_.get(), POLLIN, 0}};
      const size_t watched = still_wanted_ != nullptr ? 2 : 1;
      if (!Poll(std::span(entries).first(watched), deadline - Clock::Real()->Now()).ok()) {
        return Unavailable("{} took nothing for {}", peer_, absl::FormatDuration(timeout));
      }
      if (entries[1].revents != 0) {
        uint64_t count = 0;
        (void)!read(interrupt_.get(), &count, sizeof(count));
        interrupted_ = true;
        if (!still_wanted_() && may_give_up) return Cancelled("given up");
      }
      if (entries[0].revents != 0) return absl::OkStatus();
    }
  }

  const Fd fd_;
  const Fd interrupt_;  // an eventfd
  const std::string peer_;
  const std::unique_ptr<TlsStream> tls_;  // null: what is sent passes as it is
  std::atomic<int64_t> last_frame_ = 0;   // when one went or came, in Unix nanoseconds
  absl::Mutex send_mutex_;
  bool send_failed_ ABSL_GUARDED_BY(send_mutex_) = false;
  std::function<bool()> still_wanted_ ABSL_GUARDED_BY(send_mutex_);
  bool interrupted_ ABSL_GUARDED_BY(send_mutex_) = false;  // the present Send() was
  std::vector<std::byte> owed_header_ ABSL_GUARDED_BY(send_mutex_);
  size_t owed_bytes_ ABSL_GUARDED_BY(send_mutex_) = 0;  // of payload, behind it
};

// `contexts` null: without TLS.
absl::StatusOr<std::unique_ptr<KvConnection>> MakeConnection(Fd fd, const std::string& peer,
                                                             TlsContexts* contexts,
                                                             TlsStream::End end) {
  std::unique_ptr<TlsStream> tls;
  if (contexts != nullptr) {
    TANDEM_ASSIGN_OR_RETURN(const std::shared_ptr<const TlsContext> context, contexts->Now());
    TANDEM_ASSIGN_OR_RETURN(tls, TlsStream::Make(fd.get(), peer, context, end));
  }
  return std::make_unique<TcpConnection>(std::move(fd), peer, std::move(tls));
}

class TcpListener : public KvListener {
 public:
  // `contexts` outlives this; null: without TLS.
  TcpListener(Fd fd, std::string address, TlsContexts* contexts)
      : fd_(std::move(fd)), address_(std::move(address)), contexts_(contexts) {}

  const std::string& address() const override { return address_; }

  absl::StatusOr<std::unique_ptr<KvConnection>> Accept(absl::Duration timeout) override {
    const absl::Time deadline = Clock::Real()->Now() + timeout;
    while (true) {
      sockaddr_storage peer = {};
      socklen_t length = sizeof(peer);
      auto* address = reinterpret_cast<sockaddr*>(&peer);
      const int fd = accept4(fd_.get(), address, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd >= 0) {
        return MakeConnection(Fd(fd), AddressText(address, length), contexts_,
                              TlsStream::End::kAccepts);
      }
      switch (errno) {
        case EAGAIN:
          TANDEM_RETURN_IF_ERROR(Poll(fd_.get(), POLLIN, deadline - Clock::Real()->Now()));
          continue;
        case EMFILE:
        case ENFILE:
        case ENOBUFS:
        case ENOMEM:
          return ResourceExhausted("accept: {}", ErrnoText(errno));
        case EINVAL:  // after Shutdown()
        case EBADF:
          return Unavailable("listener {} is closed", address_);
        default:
          continue;  // the peer gave up between its SYN and our accept
      }
    }
  }

  void Shutdown() override { (void)shutdown(fd_.get(), SHUT_RDWR); }

 private:
  const Fd fd_;
  const std::string address_;
  TlsContexts* const contexts_;
};

class TcpKvNetwork : public KvNetwork {
 public:
  explicit TcpKvNetwork(std::unique_ptr<TlsContexts> contexts) : contexts_(std::move(contexts)) {}

  absl::StatusOr<std::unique_ptr<KvListener>> Listen(const std::string& host, int port) override {
    TANDEM_ASSIGN_OR_RETURN(const AddrinfoPtr list, Resolve(host, port, /*passive=*/true));
    Fd fd(socket(list->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (fd.get() < 0) return ResourceExhausted("socket: {}", ErrnoText(errno));
    SetOption(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
    // Before listen(), so that the window scale of accepted connections fits the buffer.
    SetOption(fd.get(), SOL_SOCKET, SO_RCVBUF, kSocketBufferBytes);
    if (bind(fd.get(), list->ai_addr, list->ai_addrlen) != 0) {
      return Unavailable("cannot listen for KV on {}:{}: {}", host, port, ErrnoText(errno));
    }
    if (listen(fd.get(), SOMAXCONN) != 0) {
      return Unavailable("cannot listen for KV on {}:{}: {}", host, port, ErrnoText(errno));
    }
    sockaddr_storage bound = {};
    socklen_t length = sizeof(bound);
    auto* address = reinterpret_cast<sockaddr*>(&bound);
    if (getsockname(fd.get(), address, &length) != 0) {
      return Internal("getsockname: {}", ErrnoText(errno));
    }
    return std::make_unique<TcpListener>(std::move(fd), AddressText(address, length),
                                         contexts_.get());
  }

  absl::StatusOr<std::unique_ptr<KvConnection>> Dial(const std::string& address,
                                                     absl::Duration timeout) override {
    TANDEM_ASSIGN_OR_RETURN(const HostPort target, ParseHostPort(address));
    TANDEM_ASSIGN_OR_RETURN(const AddrinfoPtr list,
                            Resolve(target.host, target.port, /*passive=*/false));
    const absl::Time deadline = Clock::Real()->Now() + timeout;
    absl::Status last = Unavailable("{} has no address", address);
    for (const addrinfo* entry = list.get(); entry != nullptr; entry = entry->ai_next) {
      Fd fd(socket(entry->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
      if (fd.get() < 0) {
        last = ResourceExhausted("socket: {}", ErrnoText(errno));
        continue;
      }
      // Before connect(), for the same reason as in Listen.
      SetOption(fd.get(), SOL_SOCKET, SO_RCVBUF, kSocketBufferBytes);
      last = Connect(fd.get(), *entry, address, deadline - Clock::Real()->Now());
      if (last.ok()) {
        return MakeConnection(std::move(fd), address, contexts_.get(), TlsStream::End::kDials);
      }
    }
    return last;
  }

 private:
  static absl::Status Connect(int fd, const addrinfo& entry, const std::string& address,
                              absl::Duration timeout) {
    if (connect(fd, entry.ai_addr, entry.ai_addrlen) == 0) return absl::OkStatus();
    if (errno != EINPROGRESS) return Unavailable("connecting to {}: {}", address, ErrnoText(errno));
    if (!Poll(fd, POLLOUT, timeout).ok()) {
      return DeadlineExceeded("{} did not accept a connection in time", address);
    }
    int error = 0;
    socklen_t length = sizeof(error);
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
    if (error != 0) return Unavailable("connecting to {}: {}", address, ErrnoText(error));
    return absl::OkStatus();
  }

  const std::unique_ptr<TlsContexts> contexts_;  // null: without TLS
};

}  // namespace

absl::Status ReceiveAll(KvConnection* connection, MutableBytes into, absl::Duration timeout) {
  while (!into.empty()) {
    TANDEM_ASSIGN_OR_RETURN(const size_t n, connection->ReceiveSome({&into, 1}));
    into = into.subspan(n);
    if (n == 0) TANDEM_RETURN_IF_ERROR(connection->WaitReadable(timeout));
  }
  return absl::OkStatus();
}

KvNetwork* TcpNetwork() {
  static TcpKvNetwork* network = new TcpKvNetwork(nullptr);
  return network;
}

std::unique_ptr<KvNetwork> MakeTlsNetwork(std::function<TlsTexts()> texts) {
  return std::make_unique<TcpKvNetwork>(std::make_unique<TlsContexts>(std::move(texts)));
}

}  // namespace tandem::kvtransfer
