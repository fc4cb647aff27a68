#include "common/rpc/cluster_flags.h"

#include <utility>

#include "common/base/status.h"

namespace tandem {
namespace {

constexpr char kCertificate[] = "--cluster-cert";
constexpr char kKey[] = "--cluster-key";
constexpr char kCa[] = "--cluster-ca";

}  // namespace

void AddClusterTlsFlags(FlagSet* flags, TlsFiles* tls) {
  flags->Add(kCertificate, &tls->certificate,
             "PEM file of a certificate that this process shows to others of its cluster, beside "
             "the proof of the secret, and of those that lead to its CA; read again when it "
             "changes; default: the secret is enough",
             "path");
  flags->Add(kKey, &tls->key, "PEM file of its key", "path");
  flags->Add(kCa, &tls->ca,
             "PEM file of the CA that the certificates of all processes of the cluster are of",
             "path");
}

void AddClusterFlags(FlagSet* flags, std::string* secret, TlsFiles* tls) {
  flags->Add("--cluster-secret", secret,
             "what all processes of a cluster prove to each other; better in the environment, "
             "which `ps` does not show");
  AddClusterTlsFlags(flags, tls);
}

absl::Status CheckClusterFlags(const TlsFiles& tls) {
  const bool some = !tls.certificate.empty() || !tls.key.empty() || !tls.ca.empty();
  const bool all = !tls.certificate.empty() && !tls.key.empty() && !tls.ca.empty();
  if (some == all) return absl::OkStatus();
  return InvalidArgument("{}, {} and {} go together", kCertificate, kKey, kCa);
}

absl::StatusOr<std::shared_ptr<CertificateFiles>> OpenClusterCertificate(
    const TlsFiles& tls, std::function<void(absl::Time not_after)> on_certificate) {
  TANDEM_RETURN_IF_ERROR(CheckClusterFlags(tls));
  if (tls.certificate.empty()) return std::shared_ptr<CertificateFiles>();
  return CertificateFiles::Open(tls, {kCertificate, kKey, kCa}, std::move(on_certificate));
}

}  // namespace tandem
