// What the router counts of API keys. Labels are names out of the file, so there are no more of
// them than its writer wants.
//
// Thread-safe. `metrics` outlives all.
#pragma once

#include <string>

#include "common/metrics/metrics.h"

namespace tandem::router {

// Of one name.
struct KeyMetrics {
  KeyMetrics(Metrics* metrics, const std::string& name);

  prometheus::Counter& requests;          // tandem_api_key_requests_total
  prometheus::Counter& tokens;            // tandem_api_key_tokens_total
  prometheus::Counter& refused_requests;  // tandem_api_key_refused_total{reason}
  prometheus::Counter& refused_tokens;
  prometheus::Counter& refused_priority;
};

// tandem_api_keys_file_broken
prometheus::Gauge& KeysFileBroken(Metrics* metrics);

}  // namespace tandem::router
