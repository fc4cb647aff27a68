#include "common/metrics/https_page.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <netdb.h>
#include <poll.h>
#include <string_view>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <utility>

#include "absl/time/time.h"
#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/log_limiter.h"
#include "common/base/status.h"

namespace tandem {
namespace {

constexpr int kThreads = 4;
constexpr absl::Duration kLongestHandshake = absl::Seconds(2);
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

}  // namespace

absl::StatusOr<std::unique_ptr<HttpsPage>> HttpsPage::Serve(const HostPort& address,
                                                            std::string path,
                                                            std::string content_type,
                                                            std::function<std::string()> page,
                                                            std::function<TlsTexts()> texts) {
  int port = 0;
  absl::StatusOr<Fd> listener = Listen(address, &port);
  if (!listener.ok()) {
    return Unavailable("cannot listen on {}: {}", address.ToString(),
                       WhyCannotListen(address.ToString()));
  }
  return std::unique_ptr<HttpsPage>(new HttpsPage(*std::move(listener), port, std::move(path),
                                                  std::move(content_type), std::move(page),
                                                  std::move(texts)));
}

HttpsPage::HttpsPage(Fd listener, int port, std::string path, std::string content_type,
                     std::function<std::string()> page, std::function<TlsTexts()> texts)
    : listener_(std::move(listener)),
      stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      port_(port),
      path_(std::move(path)),
      content_type_(std::move(content_type)),
      page_(std::move(page)),
      contexts_(std::move(texts)) {
  for (int i = 0; i < kThreads; ++i) threads_.emplace_back([this] { Run(); });
}

HttpsPage::~HttpsPage() {
  const uint64_t one = 1;
  (void)!write(stop_.get(), &one, sizeof(one));
  for (std::thread& thread : threads_) thread.join();
}

void HttpsPage::Run() {
  while (AwaitEvent(listener_.get(), POLLIN, stop_.get(), absl::InfiniteFuture())) {
    const Fd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (fd.valid()) Answer(fd.get());
    // Of several threads one gets a connection. Out of descriptors: until some are given back.
    if (!fd.valid() && errno != EAGAIN && errno != EWOULDBLOCK) {
      AwaitEvent(stop_.get(), POLLIN, stop_.get(), Clock::Real()->Now() + absl::Milliseconds(100));
    }
  }
}

void HttpsPage::Answer(int fd) {
  static LogLimiter limiter;
  const absl::Time deadline = Clock::Real()->Now() + kLongestConnection;
  const auto context = contexts_.Now();
  if (!context.ok()) return;
  const auto stream =
      TlsStream::Make(fd, "a client of /metrics", *context, TlsStream::End::kAccepts);
  if (!stream.ok()) return;
  TlsStream& tls = **stream;
  if (const absl::Status shaken = tls.Handshake(kLongestHandshake); !shaken.ok()) {
    if (limiter.Allow()) {
      spdlog::warn("metrics: refused: {}{}", MessageOf(shaken), limiter.Withheld());
    }
    return;
  }
  std::string request;
  std::array<char, 4096> piece;
  while (request.find("\r\n\r\n") == std::string::npos) {
    const iovec into = {piece.data(), piece.size()};
    const absl::StatusOr<size_t> n = tls.Receive({&into, 1});
    if (!n.ok() || request.size() > kMaxRequestBytes) return;
    request.append(piece.data(), *n);
    if (*n == 0 && !AwaitEvent(fd, POLLIN, stop_.get(), deadline)) return;
  }
  const std::string answer = AnswerTo(request);
  std::string_view rest = answer;
  while (true) {
    const iovec from = {const_cast<char*>(rest.data()), rest.size()};
    const absl::StatusOr<size_t> n = tls.Send({&from, 1});
    if (!n.ok()) return;
    rest.remove_prefix(*n);
    const absl::StatusOr<bool> sent = tls.Flush();
    if (!sent.ok() || (*sent && rest.empty())) break;
    if (!*sent && !AwaitEvent(fd, POLLOUT, stop_.get(), deadline)) return;
  }
  (void)shutdown(fd, SHUT_WR);
}

std::string HttpsPage::AnswerTo(const std::string& request) const {
  std::string_view line = request;
  line = line.substr(0, line.find("\r\n"));
  std::string status = "404 Not Found", type = "text/plain", body = "there is only " + path_ + "\n";
  if (line.starts_with("GET " + path_ + " ") || line.starts_with("GET " + path_ + "?")) {
    status = "200 OK";
    type = content_type_;
    body = page_();
  }
  return fmt::format(
      "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n"
      "Connection: close\r\n\r\n{}",
      status, type, body.size(), body);
}

}  // namespace tandem
