// TLS of a public server: a certificate, its key, and perhaps the CA of the certificates that
// clients must show (mutual TLS). All are PEM files, watched and read again when they change:
// connections that are there go on as they are, new ones get the new certificate.
//
// A change is taken over only as a whole: a key that is not the certificate's, one that cannot be
// read, and a certificate that has expired change nothing, and the log says so every minute
// (FileWatch). Internal servers have ClusterCredentials instead.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

namespace tandem {

// Paths of PEM files.
struct TlsFiles {
  std::string certificate;  // the server's own first, then those that lead to its CA
  std::string key;          // not encrypted
  std::string client_ca;    // "": clients need no certificate
};

// Thread-safe.
class ServerTls {
 public:
  // `on_certificate` is told when the certificate will expire: now, and after each change, from any
  // thread. An error names the file.
  static absl::StatusOr<std::shared_ptr<ServerTls>> Open(
      const TlsFiles& files, std::function<void(absl::Time not_after)> on_certificate);
  virtual ~ServerTls() = default;

  // For one listening port; this outlives the server that has it.
  virtual std::shared_ptr<grpc::ServerCredentials> Credentials() = 0;
};

}  // namespace tandem
