#include "common/config/trace_flags.h"

#include "common/base/host_port.h"
#include "common/base/status.h"

namespace tandem {

void AddTraceFlags(FlagSet* flags, TraceOptions* options) {
  flags->Group("Traces");
  flags->Add("--otlp-endpoint", &options->otlp_endpoint,
             "OpenTelemetry collector that gets this process's spans by OTLP over gRPC, without "
             "TLS; empty: nothing is traced",
             "HOST:PORT");
}

absl::Status CheckTraceFlags(const TraceOptions& options) {
  if (options.otlp_endpoint.empty()) return absl::OkStatus();
  const absl::StatusOr<HostPort> address = ParseHostPort(options.otlp_endpoint);
  if (address.ok() && address->port > 0) return absl::OkStatus();
  return InvalidArgument("--otlp-endpoint must be HOST:PORT, as 127.0.0.1:4317, got '{}'",
                         options.otlp_endpoint);
}

}  // namespace tandem
