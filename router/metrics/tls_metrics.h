// What the router measures of its TLS.
#pragma once

#include "common/metrics/metrics.h"

namespace tandem::router {

// tandem_tls_certificate_expiry_timestamp_seconds
prometheus::Gauge& TlsCertificateExpiry(Metrics* metrics);

}  // namespace tandem::router
