#include "common/rpc/public_server.h"

#include <csignal>
#include <netdb.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"

#include "common/base/fd.h"
#include "common/base/host_port.h"
#include "openssl/err.h"
#include "openssl/ssl.h"

namespace tandem {
namespace {

// Connected to `address`, with bounds on what each of its calls may take; -1 if that fails.
Fd Connect(const std::string& address, absl::Duration timeout) {
  const absl::StatusOr<HostPort> to = ParseHostPort(address);
  if (!to.ok()) return Fd();
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(to->host.c_str(), std::to_string(to->port).c_str(), &hints, &found) != 0) {
    return Fd();
  }
  Fd fd(socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const timeval bound = absl::ToTimeval(timeout);
  setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &bound, sizeof(bound));
  setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &bound, sizeof(bound));
  const bool connected = connect(fd.get(), found->ai_addr, found->ai_addrlen) == 0;
  freeaddrinfo(found);
  return connected ? std::move(fd) : Fd();
}

}  // namespace

void ShowKey(const PublicServer& server, grpc::ClientContext* context) {
  if (server.api_key.empty()) return;
  // Of a file there may be a line end behind it; with anything else that no header can hold gRPC
  // would end the process, and the key is wrong anyway.
  const std::string key(absl::StripAsciiWhitespace(server.api_key));
  context->AddMetadata("authorization", "Bearer " + absl::CHexEscape(key));
}

std::optional<bool> SpeaksTls(const std::string& address, absl::Duration timeout) {
  const Fd fd = Connect(address, timeout);
  if (!fd.valid()) return std::nullopt;
  // OpenSSL writes to a connection that the other end may have closed.
  const auto before = std::signal(SIGPIPE, SIG_IGN);
  SSL_CTX* const context = SSL_CTX_new(TLS_client_method());
  SSL* const ssl = SSL_new(context);
  SSL_set_fd(ssl, fd.get());
  const int connected = SSL_connect(ssl);
  const int error = SSL_get_error(ssl, connected);
  // Agreed upon once the server has answered, whatever becomes of the handshake then.
  const bool answered = connected == 1 || SSL_get_current_cipher(ssl) != nullptr;
  SSL_free(ssl);
  SSL_CTX_free(context);
  ERR_clear_error();
  std::signal(SIGPIPE, before);
  if (answered) return true;
  if (error == SSL_ERROR_SSL) return false;  // something came, and was no TLS
  return std::nullopt;
}

}  // namespace tandem
