// The flags by which a process shows that it is of a cluster: the secret, and certificates of an
// authority where the secret alone is not to be enough. Servers and the command line have the same.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/auth/certificate_files.h"
#include "common/config/flags.h"

namespace tandem {

// --cluster-cert, --cluster-key, --cluster-ca.
void AddClusterTlsFlags(FlagSet* flags, TlsFiles* tls);
// Those, and --cluster-secret.
void AddClusterFlags(FlagSet* flags, std::string* secret, TlsFiles* tls);
// INVALID_ARGUMENT unless all three files are named, or none.
absl::Status CheckClusterFlags(const TlsFiles& tls);
// Null where none is named. `on_certificate` as in CertificateFiles::Open.
absl::StatusOr<std::shared_ptr<CertificateFiles>> OpenClusterCertificate(
    const TlsFiles& tls, std::function<void(absl::Time not_after)> on_certificate = nullptr);

}  // namespace tandem
