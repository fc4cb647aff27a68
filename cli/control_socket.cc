#include "cli/control_socket.h"

#include <cerrno>
#include <cstring>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>
#include <utility>

#include "cli/cluster_note.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

constexpr size_t kMaxMessageBytes = 1 << 20;
constexpr int kAnswerWithinSeconds = 10;

absl::StatusOr<sockaddr_un> AddressOf(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return InvalidArgument("{}: longer than the {} bytes that a socket's path may have", path,
                           sizeof(address.sun_path) - 1);
  }
  path.copy(address.sun_path, path.size());
  return address;
}

void SetTimeouts(int fd, timeval time) {
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time));
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof(time));
}

// Until the other end has said all it wants to.
std::string ReceiveAll(int fd) {
  std::string text;
  char buffer[4096];
  ssize_t n = 0;
  while (text.size() < kMaxMessageBytes && (n = recv(fd, buffer, sizeof(buffer), 0)) > 0) {
    text.append(buffer, static_cast<size_t>(n));
  }
  return text;
}

bool SendAll(int fd, const std::string& text) {
  size_t sent = 0;
  while (sent < text.size()) {
    const ssize_t n = send(fd, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) return false;
    sent += static_cast<size_t>(n);
  }
  return shutdown(fd, SHUT_WR) == 0;
}

std::string PathOf(const std::string& server) { return ClusterNotePath(server) + ".control"; }

}  // namespace

absl::StatusOr<std::unique_ptr<ControlSocket>> ControlSocket::Listen(const std::string& server,
                                                                     Handler handler) {
  TANDEM_RETURN_IF_ERROR(ReadClusterNote(server).status());  // the directory is ours alone
  const std::string path = PathOf(server);
  TANDEM_ASSIGN_OR_RETURN(const sockaddr_un address, AddressOf(path));
  Fd listener(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  unlink(path.c_str());  // of one that was killed
  if (listener.get() < 0 ||
      bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0 ||
      listen(listener.get(), 8) != 0) {
    return Unavailable("{}: {}", path, std::strerror(errno));
  }
  return std::unique_ptr<ControlSocket>(
      new ControlSocket(path, std::move(listener), std::move(handler)));
}

ControlSocket::~ControlSocket() { unlink(path_.c_str()); }

void ControlSocket::Answer() {
  const Fd caller(accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (caller.get() < 0) return;
  SetTimeouts(caller.get(), {.tv_sec = 0, .tv_usec = 200'000});
  const nlohmann::json request =
      nlohmann::json::parse(ReceiveAll(caller.get()), nullptr, /*allow_exceptions=*/false);
  absl::StatusOr<nlohmann::json> answer = InvalidArgument("the request is not a JSON object");
  if (request.is_object()) answer = handler_(request);
  SendAll(caller.get(), answer.ok() ? answer->dump()
                                    : nlohmann::json{{"error", MessageOf(answer.status())}}.dump());
}

absl::StatusOr<nlohmann::json> AskUp(const std::string& server, const nlohmann::json& request) {
  if (const auto note = ReadClusterNote(server); !note.ok()) {
    return NotFound("no `tandem up` of this user runs a cluster at {}", server);
  }
  TANDEM_ASSIGN_OR_RETURN(const sockaddr_un address, AddressOf(PathOf(server)));
  const Fd up(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  SetTimeouts(up.get(), {.tv_sec = kAnswerWithinSeconds, .tv_usec = 0});
  if (connect(up.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return NotFound("the `tandem up` of the cluster at {} is gone: {}", server,
                    std::strerror(errno));
  }
  if (!SendAll(up.get(), request.dump())) {
    return Unavailable("the `tandem up` of the cluster at {}: {}", server, std::strerror(errno));
  }
  nlohmann::json answer =
      nlohmann::json::parse(ReceiveAll(up.get()), nullptr, /*allow_exceptions=*/false);
  if (!answer.is_object()) {
    return Unavailable("the `tandem up` of the cluster at {} did not answer within {} s", server,
                       kAnswerWithinSeconds);
  }
  if (answer.contains("error")) {
    return FailedPrecondition("{}", answer["error"].is_string() ? answer["error"].get<std::string>()
                                                                : answer["error"].dump());
  }
  return answer;
}

}  // namespace tandem::cli
