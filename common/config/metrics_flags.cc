#include "common/config/metrics_flags.h"

#include "common/base/host_port.h"
#include "common/base/status.h"

namespace tandem {

void AddMetricsFlags(FlagSet* flags, MetricsOptions* options) {
  flags->Add("--metrics-listen", &options->listen, "address of /metrics; port 0: any", "HOST:PORT");
  flags->Add("--metrics-tls", &options->tls,
             "/metrics by HTTPS, with --cluster-cert, for who shows a certificate of --cluster-ca");
  flags->Add("--metrics-insecure", &options->insecure,
             "other hosts may read /metrics without TLS, where --metrics-listen lets them");
}

absl::Status CheckMetricsFlags(const MetricsOptions& options, bool has_certificate) {
  if (options.tls && !has_certificate) {
    return InvalidArgument("--metrics-tls needs --cluster-cert, --cluster-key and --cluster-ca");
  }
  const absl::StatusOr<HostPort> address = ParseHostPort(options.listen);
  if (!address.ok()) return InvalidArgument("--metrics-listen: {}", MessageOf(address.status()));
  if (options.tls || options.insecure || IsLoopback(address->host)) return absl::OkStatus();
  return InvalidArgument(
      "--metrics-listen {} is reached from other hosts, by anybody: give --metrics-tls, or "
      "--metrics-insecure if that is what you want",
      options.listen);
}

}  // namespace tandem
