// What a worker's loop drives, without a model: pool, prefix cache, fake runner, metrics, and a
// clock that a test moves. One for every worker in a test.
#pragma once

#include <functional>
#include <memory>

#include "common/metrics/metrics.h"
#include "engine/kv/block_pool.h"
#include "engine/kv/prefix_cache.h"
#include "simulation/delayed_model_runner.h"
#include "simulation/fake_clock.h"
#include "simulation/fake_model_runner.h"

namespace tandem::engine {

struct FakeEngineOptions {
  int num_blocks = 64;
  int block_size = 16;
  bool caching = true;
  FakeModelOptions model;
  // Where set, steps are computed on a thread of their own, each after such a delay.
  std::function<absl::Duration()> step_delay;
};

// Not thread-safe; used by the thread of one loop, but for `metrics`.
class FakeEngine {
 public:
  explicit FakeEngine(const FakeEngineOptions& options)
      : memory(options.num_blocks, options.block_size),
        pool(options.num_blocks),
        cache(&pool, options.block_size, options.caching),
        fake(memory.region(), options.model) {
    if (options.step_delay) {
      delayed_ = std::make_unique<DelayedModelRunner>(&fake, options.step_delay);
    }
  }

  ModelRunner& runner() {
    if (delayed_ != nullptr) return *delayed_;
    return fake;
  }

  FakeKvMemory memory;
  BlockPool pool;
  PrefixCache cache;
  FakeModelRunner fake;
  Metrics metrics;

 private:
  std::unique_ptr<DelayedModelRunner> delayed_;
};

}  // namespace tandem::engine
