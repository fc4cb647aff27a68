#include "common/metrics/http_page.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <netdb.h>
#include <poll.h>
#include <span>
#include <string_view>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/log_limiter.h"
#include "common/base/status.h"

namespace tandem {
namespace {

constexpr int kThreads = 4;
// Until all of a request is here, a handshake included.
constexpr absl::Duration kLongestRequest = absl::Seconds(2);
constexpr absl::Duration kLongestConnection = absl::Seconds(10);
constexpr size_t kMaxRequestBytes = 16 << 10;

// A listening socket; UNAVAILABLE without a reason, which WhyCannotListen finds.
absl::StatusOr<Fd> Listen(const HostPort& address, int* port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found) !=
      0) {
    return absl::UnavailableError("");
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  Fd fd(socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const int one = 1;
  sockaddr_storage bound{};
  socklen_t length = sizeof(bound);
  if (!fd.valid() || setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) != 0 ||
      bind(fd.get(), found->ai_addr, found->ai_addrlen) != 0 || listen(fd.get(), SOMAXCONN) != 0 ||
      getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &length) != 0) {
    return absl::UnavailableError("");
  }
  std::array<char, NI_MAXSERV> service{};
  getnameinfo(reinterpret_cast<sockaddr*>(&bound), length, nullptr, 0, service.data(),
              service.size(), NI_NUMERICSERV);
  *port = std::atoi(service.data());
  return fd;
}

// False at the deadline, and where the process ends.
bool AwaitEvent(int fd, short events, int stop, absl::Time deadline) {
  while (true) {
    const absl::Duration left = deadline - Clock::Real()->Now();
    const int64_t wait_ms = absl::ToInt64Milliseconds(left + absl::Microseconds(999));
    std::array<pollfd, 2> entries = {{{fd, events, 0}, {stop, POLLIN, 0}}};
    const int n = poll(entries.data(), entries.size(),
                       static_cast<int>(std::clamp<int64_t>(wait_ms, 0, 1 << 30)));
    if (n < 0 && errno != EINTR) return false;
    if (n > 0) return entries[1].revents == 0;
    if (left <= absl::ZeroDuration()) return false;
  }
}

// The value of that header of `request`, "" where it has none.
std::string HeaderOf(const std::string& request, const std::string& name) {
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(request, "\r\n"))) {
    const size_t colon = line.find(':');
    if (colon != line.npos && absl::EqualsIgnoreCase(line.substr(0, colon), name)) {
      return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
    }
  }
  return "";
}

}  // namespace

// Bytes to and from one client, in the clear. No call waits.
class HttpPage::Connection {
 public:
  explicit Connection(int fd) : fd_(fd) {}
  virtual ~Connection() = default;

  // Takes as many bytes from the front of `from` as there is room for.
  virtual absl::StatusOr<size_t> Send(std::string_view from) {
    const ssize_t n = send(fd_, from.data(), from.size(), MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EINTR) return Unavailable("the client is gone");
    return n < 0 ? 0 : static_cast<size_t>(n);
  }
  // Whether all that was taken is on its way.
  virtual absl::StatusOr<bool> Flush() { return true; }
  // Fills `into` from the front with what is here; 0: nothing.
  virtual absl::StatusOr<size_t> Receive(std::span<char> into) {
    const ssize_t n = recv(fd_, into.data(), into.size(), 0);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
      return Unavailable("the client is gone");
    }
    return n < 0 ? 0 : static_cast<size_t>(n);
  }

 private:
  const int fd_;
};

class HttpPage::TlsConnection final : public Connection {
 public:
  TlsConnection(int fd, std::unique_ptr<TlsStream> stream)
      : Connection(fd), stream_(std::move(stream)) {}

  absl::StatusOr<size_t> Send(std::string_view from) override {
    const iovec one = {const_cast<char*>(from.data()), from.size()};
    return stream_->Send({&one, 1});
  }
  absl::StatusOr<bool> Flush() override { return stream_->Flush(); }
  absl::StatusOr<size_t> Receive(std::span<char> into) override {
    const iovec one = {into.data(), into.size()};
    return stream_->Receive({&one, 1});
  }

 private:
  const std::unique_ptr<TlsStream> stream_;
};

absl::StatusOr<std::unique_ptr<HttpPage>> HttpPage::Serve(const HostPort& address, std::string path,
                                                          Page page,
                                                          std::function<TlsTexts()> texts) {
  int port = 0;
  absl::StatusOr<Fd> listener = Listen(address, &port);
  if (!listener.ok()) {
    return Unavailable("cannot listen on {}: {}", address.ToString(),
                       WhyCannotListen(address.ToString()));
  }
  return std::unique_ptr<HttpPage>(
      new HttpPage(*std::move(listener), port, std::move(path), std::move(page), std::move(texts)));
}

HttpPage::HttpPage(Fd listener, int port, std::string path, Page page,
                   std::function<TlsTexts()> texts)
    : listener_(std::move(listener)),
      stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      port_(port),
      path_(std::move(path)),
      page_(std::move(page)),
      contexts_(texts ? std::make_unique<TlsContexts>(std::move(texts)) : nullptr) {
  for (int i = 0; i < kThreads; ++i) threads_.emplace_back([this] { Run(); });
}

HttpPage::~HttpPage() {
  const uint64_t one = 1;
  (void)!write(stop_.get(), &one, sizeof(one));
  for (std::thread& thread : threads_) thread.join();
}

void HttpPage::Run() {
  while (AwaitEvent(listener_.get(), POLLIN, stop_.get(), absl::InfiniteFuture())) {
    const Fd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd.valid()) Answer(fd.get());
    // Of several threads one gets a connection. Out of descriptors: until some are given back.
    if (!fd.valid() && errno != EAGAIN && errno != EWOULDBLOCK) {
      AwaitEvent(stop_.get(), POLLIN, stop_.get(), Clock::Real()->Now() + absl::Milliseconds(100));
    }
  }
}

std::unique_ptr<HttpPage::Connection> HttpPage::Accept(int fd) {
  static LogLimiter limiter;
  if (contexts_ == nullptr) return std::make_unique<Connection>(fd);
  const auto context = contexts_->Now();
  if (!context.ok()) return nullptr;
  auto stream = TlsStream::Make(fd, "a client of " + path_, *context, TlsStream::End::kAccepts);
  if (!stream.ok()) return nullptr;
  if (const absl::Status shaken = (*stream)->Handshake(kLongestRequest); !shaken.ok()) {
    if (limiter.Allow()) {
      spdlog::warn("metrics: refused: {}{}", MessageOf(shaken), limiter.Withheld());
    }
    return nullptr;
  }
  return std::make_unique<TlsConnection>(fd, *std::move(stream));
}

void HttpPage::Answer(int fd) {
  const absl::Time begin = Clock::Real()->Now();
  const std::unique_ptr<Connection> connection = Accept(fd);
  if (connection == nullptr) return;
  std::string request;
  std::array<char, 4096> piece;
  while (request.find("\r\n\r\n") == std::string::npos) {
    const absl::StatusOr<size_t> n = connection->Receive(piece);
    if (!n.ok() || request.size() > kMaxRequestBytes) return;
    request.append(piece.data(), *n);
    if (*n == 0 && !AwaitEvent(fd, POLLIN, stop_.get(), begin + kLongestRequest)) return;
  }
  const std::string answer = AnswerTo(request);
  std::string_view rest = answer;
  while (true) {
    const absl::StatusOr<size_t> n = connection->Send(rest);
    if (!n.ok()) return;
    rest.remove_prefix(*n);
    const absl::StatusOr<bool> sent = connection->Flush();
    if (!sent.ok() || (*sent && rest.empty())) break;
    const bool full = *n == 0 || !*sent;
    if (full && !AwaitEvent(fd, POLLOUT, stop_.get(), begin + kLongestConnection)) return;
  }
  (void)shutdown(fd, SHUT_WR);
}

std::string HttpPage::AnswerTo(const std::string& request) const {
  const std::string line = request.substr(0, request.find("\r\n"));
  std::string status = "404 Not Found";
  HttpContent content = {"text/plain", "there is only " + path_ + "\n"};
  if (line.starts_with("GET " + path_ + " ") || line.starts_with("GET " + path_ + "?")) {
    status = "200 OK";
    content = page_(HeaderOf(request, "Accept"));
  }
  return fmt::format(
      "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n"
      "Connection: close\r\n\r\n{}",
      status, content.type, content.body.size(), content.body);
}

}  // namespace tandem
