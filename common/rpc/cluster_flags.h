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
// --metrics-tls.
void AddMetricsTlsFlag(FlagSet* flags, bool* metrics_tls);
// INVALID_ARGUMENT unless all three files are named, or none where nothing else needs them.
absl::Status CheckClusterFlags(const TlsFiles& tls, bool metrics_tls = false);
// Null where none is named. `on_certificate` as in CertificateFiles::Open.
absl::StatusOr<std::shared_ptr<CertificateFiles>> OpenClusterCertificate(
    const TlsFiles& tls, std::function<void(absl::Time not_after)> on_certificate = nullptr);

}  // namespace tandem
