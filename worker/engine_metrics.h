// What a worker's engine is, as metrics that never change.
#pragma once

#include <cstdint>
#include <string>

#include "absl/time/time.h"

#include "common/metrics/metrics.h"

namespace tandem::worker {

struct EngineFacts {
  int block_size = 0;  // tokens
  int num_blocks = 0;
  int64_t kv_bytes_per_token = 0;
  std::string dtype;
  int max_model_len = 0;  // tokens
  bool prefix_caching = false;
  absl::Duration load_time;
};

// tandem_cache_config_info and tandem_model_load_seconds.
void AddEngineMetrics(Metrics* metrics, const EngineFacts& facts);

}  // namespace tandem::worker
