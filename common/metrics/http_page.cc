#include "common/metrics/http_page.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <netdb.h>
#include <poll.h>
#include <span>
#include <string_view>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <utility>
#include <vector>

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

// Each has some 100 KiB, with TLS some 500 KiB.
constexpr size_t kMaxClients = 32;
constexpr size_t kMaxRequestBytes = 16 << 10;

// A listening socket; UNAVAILABLE without a reason, which WhyCannotListen finds.
absl::StatusOr<Fd> ListenOn(const HostPort& address, int* port) {
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

// What poll() takes; without a deadline it waits for ever.
int MillisecondsUntil(absl::Time deadline, absl::Time now) {
  if (deadline == absl::InfiniteFuture()) return -1;
  const int64_t wait_ms = absl::ToInt64Milliseconds(deadline - now + absl::Microseconds(999));
  return static_cast<int>(std::clamp<int64_t>(wait_ms, 0, 1 << 30));
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

struct HttpPage::Client {
  Fd fd;
  std::unique_ptr<Connection> connection;  // of `fd`
  absl::Time deadline;
  short waits_for = POLLIN;
  std::string request = {};
  std::string answer = {};  // empty: not all of the request is here
  size_t sent = 0;          // of the answer
};

absl::StatusOr<std::unique_ptr<HttpPage>> HttpPage::Serve(const HostPort& address, std::string path,
                                                          Page page,
                                                          std::function<TlsTexts()> texts,
                                                          absl::Duration patience) {
  int port = 0;
  absl::StatusOr<Fd> listener = ListenOn(address, &port);
  if (!listener.ok()) {
    return Unavailable("cannot listen on {}: {}", address.ToString(),
                       WhyCannotListen(address.ToString()));
  }
  return std::unique_ptr<HttpPage>(new HttpPage(*std::move(listener), port, std::move(path),
                                                std::move(page), std::move(texts), patience));
}

HttpPage::HttpPage(Fd listener, int port, std::string path, Page page,
                   std::function<TlsTexts()> texts, absl::Duration patience)
    : listener_(std::move(listener)),
      stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      port_(port),
      path_(std::move(path)),
      page_(std::move(page)),
      contexts_(texts ? std::make_unique<TlsContexts>(std::move(texts)) : nullptr),
      patience_(patience),
      thread_([this] { Run(); }) {}

HttpPage::~HttpPage() {
  const uint64_t one = 1;
  (void)!write(stop_.get(), &one, sizeof(one));
  thread_.join();
}

void HttpPage::Run() {
  std::list<Client> clients;  // oldest first
  while (true) {
    std::vector<pollfd> entries = {{stop_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}};
    for (const Client& client : clients) entries.push_back({client.fd.get(), client.waits_for, 0});
    const absl::Time first = clients.empty() ? absl::InfiniteFuture() : clients.front().deadline;
    poll(entries.data(), entries.size(), MillisecondsUntil(first, Clock::Real()->Now()));
    if (entries[0].revents != 0) return;
    const absl::Time now = Clock::Real()->Now();
    auto entry = entries.begin() + 2;
    for (auto client = clients.begin(); client != clients.end(); ++entry) {
      const bool over = now >= client->deadline || (entry->revents != 0 && !GoOn(&*client));
      client = over ? clients.erase(client) : std::next(client);
    }
    if (entries[1].revents != 0) Accept(&clients);
  }
}

void HttpPage::Accept(std::list<Client>* clients) {
  Fd fd(accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (!fd.valid()) {
    // Out of descriptors: until some are given back.
    pollfd stop = {stop_.get(), POLLIN, 0};
    if (errno != EAGAIN && errno != EWOULDBLOCK) poll(&stop, 1, 100);
    return;
  }
  std::unique_ptr<Connection> connection;
  if (contexts_ == nullptr) {
    connection = std::make_unique<Connection>(fd.get());
  } else {
    const auto context = contexts_->Now();
    if (!context.ok()) return;
    auto stream =
        TlsStream::Make(fd.get(), "a client of " + path_, *context, TlsStream::End::kAccepts);
    if (!stream.ok()) return;
    connection = std::make_unique<TlsConnection>(fd.get(), *std::move(stream));
  }
  clients->push_back({std::move(fd), std::move(connection), Clock::Real()->Now() + patience_});
  if (clients->size() > kMaxClients) clients->pop_front();
}

bool HttpPage::GoOn(Client* client) const {
  if (client->answer.empty() && !Listen(client)) return false;
  return client->answer.empty() || Answer(client);
}

bool HttpPage::Listen(Client* client) const {
  static LogLimiter limiter;
  std::array<char, 4096> piece;
  while (client->request.find("\r\n\r\n") == std::string::npos) {
    const absl::StatusOr<size_t> n = client->connection->Receive(piece);
    // What a handshake has to say, also why it failed.
    const absl::StatusOr<bool> sent = client->connection->Flush();
    if (absl::IsUnauthenticated(n.status()) && limiter.Allow()) {
      spdlog::warn("metrics: refused: {}{}", MessageOf(n.status()), limiter.Withheld());
    }
    if (!n.ok() || !sent.ok() || client->request.size() > kMaxRequestBytes) return false;
    client->waits_for = *sent ? POLLIN : POLLOUT;
    if (*n == 0) return true;
    client->request.append(piece.data(), *n);
  }
  client->answer = AnswerTo(client->request);
  return true;
}

bool HttpPage::Answer(Client* client) const {
  client->waits_for = POLLOUT;
  while (true) {
    const absl::StatusOr<size_t> n =
        client->connection->Send(std::string_view(client->answer).substr(client->sent));
    if (!n.ok()) return false;
    client->sent += *n;
    const absl::StatusOr<bool> flushed = client->connection->Flush();
    if (!flushed.ok()) return false;
    if (*flushed && client->sent == client->answer.size()) break;
    if (*n == 0 || !*flushed) return true;
  }
  (void)shutdown(client->fd.get(), SHUT_WR);
  return false;
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
