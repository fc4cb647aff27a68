// TLS of a public server: a certificate, its key, and perhaps the CA of the certificates that
// clients must show (mutual TLS), from files that may change (CertificateFiles): connections that
// are there go on as they are, new ones get the new certificate. Internal servers have
// ClusterCredentials instead.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

#include "common/auth/certificate_files.h"

namespace tandem {

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
