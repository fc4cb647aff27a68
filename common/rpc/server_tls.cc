#include "common/rpc/server_tls.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpc/grpc.h"
#include "grpc/grpc_security.h"

#include "common/base/status.h"

namespace tandem {
namespace {

// gRPC asks at every handshake what to show. (Its FileWatcherCertificateProvider would do without
// this, but shows a certificate and a key that do not belong together, if it looks between the
// writing of one and the other.)
class ServerTlsImpl final : public ServerTls {
 public:
  ServerTlsImpl(std::shared_ptr<CertificateFiles> files, bool wants_certificates)
      : files_(std::move(files)), wants_certificates_(wants_certificates) {}

  std::shared_ptr<grpc::ServerCredentials> Credentials() override;

 private:
  class PortCredentials;

  // Fills `config`, unless the generation that it would have is `shown` already; sets that, which
  // nobody else may use.
  grpc_ssl_certificate_config_reload_status Show(
      int64_t* shown, grpc_ssl_server_certificate_config** config) const {
    const TlsTexts texts = files_->texts();
    if (*shown == texts.generation) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair = {texts.key.c_str(), texts.certificate.c_str()};
    // gRPC 1.51 wants roots also where no client is asked for a certificate; any will do there.
    const std::string& roots = texts.ca.empty() ? texts.certificate : texts.ca;
    *config = grpc_ssl_server_certificate_config_create(roots.c_str(), &pair, 1);
    *shown = texts.generation;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  const std::shared_ptr<CertificateFiles> files_;
  const bool wants_certificates_;  // of clients
  absl::Mutex mutex_;
  // gRPC's server keeps none of them, but asks them at each handshake.
  std::vector<std::shared_ptr<grpc::ServerCredentials>> ports_ ABSL_GUARDED_BY(mutex_);
};

// What gRPC's C++ API has no words for, but its C API has: credentials that are asked again.
class ServerTlsImpl::PortCredentials final : public grpc::ServerCredentials {
 public:
  explicit PortCredentials(ServerTlsImpl* tls) : tls_(tls) {
    const auto request = tls_->wants_certificates_
                             ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                             : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE;
    credentials_ = grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(request, Fetch, this));
  }
  ~PortCredentials() override { grpc_server_credentials_release(credentials_); }

  void SetAuthMetadataProcessor(
      const std::shared_ptr<grpc::AuthMetadataProcessor>& /*processor*/) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  // gRPC's, before each handshake.
  static grpc_ssl_certificate_config_reload_status Fetch(
      void* self, grpc_ssl_server_certificate_config** config) {
    auto* port = static_cast<PortCredentials*>(self);
    return port->tls_->Show(&port->shown_, config);
  }

  ServerTlsImpl* const tls_;
  grpc_server_credentials* credentials_ = nullptr;
  int64_t shown_ = 0;  // Show()'s
};

std::shared_ptr<grpc::ServerCredentials> ServerTlsImpl::Credentials() {
  auto port = std::make_shared<PortCredentials>(this);
  absl::MutexLock lock(&mutex_);
  return ports_.emplace_back(std::move(port));
}

}  // namespace

absl::StatusOr<std::shared_ptr<ServerTls>> ServerTls::Open(
    const TlsFiles& files, std::function<void(absl::Time)> on_certificate) {
  TANDEM_ASSIGN_OR_RETURN(
      std::shared_ptr<CertificateFiles> opened,
      CertificateFiles::Open(files, {"--tls-cert", "--tls-key", "--tls-client-ca"},
                             std::move(on_certificate)));
  return std::make_shared<ServerTlsImpl>(std::move(opened), !files.ca.empty());
}

}  // namespace tandem
