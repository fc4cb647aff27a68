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
#include "simulation/step_time.h"
#include "simulation/timed_model_runner.h"

namespace tandem::engine {

struct FakeEngineOptions {
  int num_blocks = 64;
  int block_size = 16;
  bool caching = true;
  FakeModelOptions model;
  // Where set, steps are computed on a thread of their own, each after such a delay.
  std::function<absl::Duration()> step_delay;
  // Where set, steps compute nothing, and take so long by `clock` (TimedModelRunner).
  StepTime step_time;
  Clock* clock = nullptr;
  // Where set, what the loop drives instead of the fake, which outlives it.
  std::function<std::unique_ptr<ModelRunner>(ModelRunner* fake)> wrap_runner;
  PrefixCache::ChainHash chain_hash = ChainBlockHash;
};

// Not thread-safe; used by the thread of one loop, but for `metrics`.
class FakeEngine {
 public:
  explicit FakeEngine(const FakeEngineOptions& options)
      : memory(options.num_blocks, options.block_size),
        pool(options.num_blocks),
        cache(&pool, options.block_size, options.caching, options.chain_hash),
        fake(memory.region(), options.model) {
    if (options.step_delay) {
      wrapped_ = std::make_unique<DelayedModelRunner>(&fake, options.step_delay);
    } else if (options.wrap_runner) {
      wrapped_ = options.wrap_runner(&fake);
    }
    if (options.step_time) {
      timed_ = std::make_unique<TimedModelRunner>(memory.region().layout.num_layers,
                                                  options.model.vocab_size, options.clock,
                                                  options.step_time);
    }
  }

  // Until when the loop need not be stepped, for its step takes so long.
  absl::Time BusyUntil() const {
    return timed_ != nullptr ? timed_->BusyUntil() : absl::InfinitePast();
  }
  absl::Duration TimeBusy() const {
    return timed_ != nullptr ? timed_->TimeBusy() : absl::ZeroDuration();
  }
  ModelRunner& runner() {
    if (timed_ != nullptr) return *timed_;
    if (wrapped_ != nullptr) return *wrapped_;
    return fake;
  }

  FakeKvMemory memory;
  BlockPool pool;
  PrefixCache cache;
  FakeModelRunner fake;
  Metrics metrics;

 private:
  std::unique_ptr<ModelRunner> wrapped_;
  std::unique_ptr<TimedModelRunner> timed_;
};

}  // namespace tandem::engine
