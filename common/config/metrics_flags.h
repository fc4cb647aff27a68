// The flags that say where a process serves /metrics, and to whom.
#pragma once

#include <string>

#include "absl/status/status.h"

#include "common/config/flags.h"

namespace tandem {

// Mirrors the flags of the same names, with --metrics- before them.
struct MetricsOptions {
  std::string listen = "127.0.0.1:0";
  bool tls = false;
  bool insecure = false;  // other hosts may read it without TLS
};

// Under the heading that the flags have so far.
void AddMetricsFlags(FlagSet* flags, MetricsOptions* options);
// INVALID_ARGUMENT names the flag: TLS without a certificate of the cluster, or an address beyond
// loopback without TLS that nothing says is meant.
absl::Status CheckMetricsFlags(const MetricsOptions& options, bool has_certificate);

}  // namespace tandem
