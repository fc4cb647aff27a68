#include "router/metrics/tls_metrics.h"

namespace tandem::router {

prometheus::Gauge& TlsCertificateExpiry(Metrics* metrics) {
  return metrics->Gauge(
      "tandem_tls_certificate_expiry_timestamp_seconds",
      "When the certificate of the public API expires, in seconds since 1970; with TLS only");
}

}  // namespace tandem::router
