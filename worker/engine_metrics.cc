#include "worker/engine_metrics.h"

namespace tandem::worker {

void AddEngineMetrics(Metrics* metrics, const EngineFacts& facts) {
  metrics
      ->Gauge("tandem_cache_config_info", "1; the labels say how the KV pool is laid out",
              {{"block_size", std::to_string(facts.block_size)},
               {"num_blocks", std::to_string(facts.num_blocks)},
               {"kv_bytes_per_token", std::to_string(facts.kv_bytes_per_token)},
               {"dtype", facts.dtype},
               {"max_model_len", std::to_string(facts.max_model_len)},
               {"prefix_caching", facts.prefix_caching ? "true" : "false"}})
      .Set(1);
  metrics
      ->Gauge("tandem_model_load_seconds",
              "From the start of loading until weights and KV pool were there")
      .Set(absl::ToDoubleSeconds(facts.load_time));
}

}  // namespace tandem::worker
