// The flags that say where a process sends its spans.
#pragma once

#include <string>

#include "absl/status/status.h"

#include "common/config/flags.h"

namespace tandem {

// Mirrors the flag of the same name.
struct TraceOptions {
  std::string otlp_endpoint;  // HOST:PORT; empty: nothing is traced
};

// Under the heading that the flags have so far.
void AddTraceFlags(FlagSet* flags, TraceOptions* options);
// INVALID_ARGUMENT names the flag.
absl::Status CheckTraceFlags(const TraceOptions& options);

}  // namespace tandem
