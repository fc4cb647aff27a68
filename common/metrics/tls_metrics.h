// What processes tell of their certificates.
#pragma once

#include <functional>

#include "absl/time/time.h"

#include "common/metrics/metrics.h"

namespace tandem {

enum class TlsCertificate {
  kPublic,   // of the public API: --tls-cert
  kCluster,  // shown to the others of the cluster: --cluster-cert
};

// What sets tandem_tls_certificate_expiry_timestamp_seconds of a certificate, which is on the page
// from the first time on. From any thread, while `metrics` lives.
std::function<void(absl::Time not_after)> ShowExpiry(Metrics* metrics, TlsCertificate certificate);

}  // namespace tandem
