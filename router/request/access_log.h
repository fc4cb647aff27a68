// A line for each request that ended, however it ended: who it was, what it took and where. Never
// what was asked or answered.
#pragma once

#include <string>

#include "absl/status/status.h"

#include "common/base/log.h"
#include "common/base/log_limiter.h"
#include "common/base/token_event.h"
#include "common/base/trace.h"

namespace tandem::router {

struct AccessRecord {
  std::string id;
  std::string session;   // "" where the client named none
  std::string key_name;  // of the API key; "" where none is needed, or none was known
  TraceContext trace;    // that it is a part of, if it is one
  absl::Status status;
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int completion_tokens = 0;
  DraftCounts drafts;
  int attempts = 0;  // decode workers that it was sent to
  Timing timing;
};

// What the line says; stages that took no time are left out. Of a refusal that may quote the
// client's text only the field is named.
LogFields AccessFields(const AccessRecord& record);

// Thread-safe.
class AccessLog {
 public:
  // Requests that no worker got cost a stranger next to nothing: beyond a burst a few per second
  // are logged, with the number of those that were not.
  void Write(const AccessRecord& record);

 private:
  LogLimiter unserved_{/*burst=*/100, /*per_second=*/20};
};

}  // namespace tandem::router
