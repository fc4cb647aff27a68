#include "common/rpc/server_tls.h"

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "grpc/grpc.h"
#include "grpc/grpc_security.h"
#include "spdlog/spdlog.h"

#include "common/base/file_watch.h"
#include "common/base/pem.h"
#include "common/base/status.h"

namespace tandem {
namespace {

struct Pem {
  std::string certificate;
  std::string key;
  std::string client_ca;
};

// gRPC asks at every handshake what to show. (Its FileWatcherCertificateProvider would do without
// this, but shows a certificate and a key that do not belong together, if it looks between the
// writing of one and the other.)
class ServerTlsImpl final : public ServerTls {
 public:
  ServerTlsImpl(TlsFiles files, std::function<void(absl::Time)> on_certificate)
      : files_(std::move(files)), on_certificate_(std::move(on_certificate)) {}

  absl::Status Open() {
    std::vector<std::string> paths = {files_.certificate, files_.key};
    if (!files_.client_ca.empty()) paths.push_back(files_.client_ca);
    FileWatch::Contents contents = FileWatch::Read(paths);
    TANDEM_RETURN_IF_ERROR(Take(contents));
    watch_ =
        std::make_unique<FileWatch>(std::move(paths), std::move(contents),
                                    [this](const FileWatch::Contents& now) { return Take(now); });
    return absl::OkStatus();
  }

  std::shared_ptr<grpc::ServerCredentials> Credentials() override;

 private:
  class PortCredentials;

  absl::Status Take(const FileWatch::Contents& contents) {
    for (const auto& content : contents) TANDEM_RETURN_IF_ERROR(content.status());
    const absl::StatusOr<absl::Time> not_after =
        CheckCertificateAndKey(*contents[0], *contents[1], absl::Now());
    if (!not_after.ok()) {
      return InvalidArgument("--tls-cert {}, --tls-key {}: {}", files_.certificate, files_.key,
                             MessageOf(not_after.status()));
    }
    if (contents.size() > 2) {
      if (const absl::Status ca = CheckCertificates(*contents[2]); !ca.ok()) {
        return InvalidArgument("--tls-client-ca {}: {}", files_.client_ca, MessageOf(ca));
      }
    }
    {
      absl::MutexLock lock(&mutex_);
      pem_ = {*contents[0], *contents[1], contents.size() > 2 ? *contents[2] : ""};
      ++generation_;
    }
    spdlog::info("TLS: the certificate of {} holds until {}", files_.certificate,
                 absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", *not_after, absl::UTCTimeZone()));
    if (on_certificate_) on_certificate_(*not_after);
    return absl::OkStatus();
  }

  // Fills `config`, unless the generation that it would have is `shown` already; sets that, which
  // nobody else may use.
  grpc_ssl_certificate_config_reload_status Show(int64_t* shown,
                                                 grpc_ssl_server_certificate_config** config) {
    absl::MutexLock lock(&mutex_);
    if (*shown == generation_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    const grpc_ssl_pem_key_cert_pair pair = {pem_.key.c_str(), pem_.certificate.c_str()};
    // gRPC 1.51 wants roots also where no client is asked for a certificate; any will do there.
    const std::string& roots = pem_.client_ca.empty() ? pem_.certificate : pem_.client_ca;
    *config = grpc_ssl_server_certificate_config_create(roots.c_str(), &pair, 1);
    *shown = generation_;
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }

  const TlsFiles files_;
  const std::function<void(absl::Time)> on_certificate_;
  absl::Mutex mutex_;
  Pem pem_ ABSL_GUARDED_BY(mutex_);
  int64_t generation_ ABSL_GUARDED_BY(mutex_) = 0;
  // gRPC's server keeps none of them, but asks them at each handshake.
  std::vector<std::shared_ptr<grpc::ServerCredentials>> ports_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<FileWatch> watch_;  // last: its thread uses the rest; constant after Open
};

// What gRPC's C++ API has no words for, but its C API has: credentials that are asked again.
class ServerTlsImpl::PortCredentials final : public grpc::ServerCredentials {
 public:
  explicit PortCredentials(ServerTlsImpl* tls) : tls_(tls) {
    const auto request = tls_->files_.client_ca.empty()
                             ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                             : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
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
  auto tls = std::make_shared<ServerTlsImpl>(files, std::move(on_certificate));
  TANDEM_RETURN_IF_ERROR(tls->Open());
  return tls;
}

}  // namespace tandem
