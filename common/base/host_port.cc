#include "common/base/host_port.h"

#include <arpa/inet.h>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common/base/status.h"

namespace tandem {

std::string HostPort::ToString() const {
  const bool ipv6 = host.find(':') != std::string::npos;
  return ipv6 ? fmt::format("[{}]:{}", host, port) : fmt::format("{}:{}", host, port);
}

absl::StatusOr<HostPort> ParseHostPort(std::string_view address) {
  const size_t colon = address.rfind(':');
  if (colon == std::string_view::npos || colon == 0) {
    return InvalidArgument("address '{}' must be HOST:PORT, e.g. 127.0.0.1:8000", address);
  }
  HostPort out;
  std::string_view host = address.substr(0, colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  if (!bracketed && host.find(':') != std::string_view::npos) {
    return InvalidArgument("address '{}': an IPv6 host needs brackets, e.g. [::1]:8000", address);
  }
  out.host = std::string(host);
  const std::string_view port = address.substr(colon + 1);
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), out.port);
  if (error != std::errc() || end != port.data() + port.size() || out.port < 0 ||
      out.port > 65535) {
    return InvalidArgument("address '{}': the port must be a number from 0 to 65535, got '{}'",
                           address, port);
  }
  return out;
}

bool IsLoopback(std::string_view host) {
  if (host == "localhost" || host == "::1") return true;
  // A name may begin with "127." too, and stand for anything.
  in_addr address{};
  return host.starts_with("127.") && inet_pton(AF_INET, std::string(host).c_str(), &address) == 1;
}

std::string WhyCannotListen(const std::string& address) {
  const absl::StatusOr<HostPort> parsed = ParseHostPort(address);
  if (!parsed.ok()) return MessageOf(parsed.status());
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  const std::string port = std::to_string(parsed->port);
  if (const int error = getaddrinfo(parsed->host.c_str(), port.c_str(), &hints, &found)) {
    return fmt::format("host '{}' is not known: {}", parsed->host, gai_strerror(error));
  }
  std::string why = "unknown reason";
  for (const addrinfo* info = found; info != nullptr; info = info->ai_next) {
    const int fd = socket(info->ai_family, info->ai_socktype, info->ai_protocol);
    if (fd < 0) continue;
    const int one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd, info->ai_addr, info->ai_addrlen) != 0 || listen(fd, 1) != 0) {
      why = errno == EADDRINUSE
                ? "port in use (another process listens there; choose another port, or 0 for any)"
                : std::string(std::strerror(errno));
    }
    close(fd);
  }
  freeaddrinfo(found);
  return why;
}

}  // namespace tandem
