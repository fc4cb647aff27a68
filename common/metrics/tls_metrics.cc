#include "common/metrics/tls_metrics.h"

namespace tandem {

std::function<void(absl::Time not_after)> ShowExpiry(Metrics* metrics, TlsCertificate certificate) {
  return [metrics, certificate](absl::Time not_after) {
    metrics
        ->Gauge("tandem_tls_certificate_expiry_timestamp_seconds",
                "When a certificate expires, in seconds since 1970, by whom it is shown to: "
                "public (clients), cluster; with TLS only",
                {{"certificate", certificate == TlsCertificate::kPublic ? "public" : "cluster"}})
        .Set(absl::ToDoubleSeconds(not_after - absl::UnixEpoch()));
  };
}

}  // namespace tandem
