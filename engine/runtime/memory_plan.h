// How large a KV pool can be, and how long the sequences in it: arithmetic only.
#pragma once

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"

#include "common/base/kv_layout.h"

namespace tandem::engine {

struct PoolPlan {
  int num_blocks = 0;
  int max_model_len = 0;  // tokens
};

// A pool of `bytes` for sequences of up to `max_model_len` tokens; 0: as long as fits, at most
// `limit`, which is what the model allows. INVALID_ARGUMENT with the largest length that would fit,
// followed by `remedy`.
absl::StatusOr<PoolPlan> PlanPool(const KvLayout& layout, size_t bytes, int max_model_len,
                                  int limit, const std::string& remedy);

// The memory of a device that has memory of its own; bytes. Several processes may share a device:
// each takes its own share of it.
struct DeviceMemory {
  size_t total = 0;
  // By other processes and the driver when this process had opened the device; and by this
  // process's own context, which nobody can tell from them.
  size_t used_before = 0;
  size_t weights = 0;
  size_t workspace = 0;      // all else but the pool, with what is kept in reserve
  double utilization = 0.9;  // --gpu-memory-utilization: of `total`, for this process
  size_t pool = 0;           // --kv-cache-memory-bytes; 0: what the others leave of the utilization
  // Over which the pool is split: `pool` is one's piece, the flag's value that of all.
  int ranks = 1;
};

// As PlanPool. RESOURCE_EXHAUSTED with all figures where the share is not free or leaves nothing
// for a pool; remedies name the flag that would help.
absl::StatusOr<PoolPlan> PlanDevicePool(const KvLayout& layout, const DeviceMemory& memory,
                                        int max_model_len, int limit);

}  // namespace tandem::engine
