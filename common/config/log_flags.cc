#include "common/config/log_flags.h"

namespace tandem {

void AddLogFlags(FlagSet* flags, LogOptions* options) {
  flags->Group("Logs");
  flags->Group("Logs");
  flags->AddChoice("--log-level", &options->log_level, {"debug", "info", "warn", "error"},
                   "what is logged to stderr; at info, a line for each request that ends");
  flags->AddChoice("--log-format", &options->log_format, {"text", "json"},
                   "how it is logged; json: an object per line");
}

}  // namespace tandem
