// The command-line flags of EngineOptions, the same for every worker.
#pragma once

#include "common/config/flags.h"
#include "engine/runtime/engine.h"

namespace tandem::engine {

// Adds --model, --load-format, --dtype, --kv-cache-dtype, --quantization, --block-size,
// --max-model-len, --max-num-batched-tokens, --max-num-seqs, --gpu, --gpu-memory-utilization,
// --kv-cache-memory-bytes, --enable-prefix-caching, --seed, --num-threads and --report-loading.
// Both pointers must live until the flags are parsed.
void AddEngineFlags(FlagSet* flags, EngineOptions* options);

}  // namespace tandem::engine
