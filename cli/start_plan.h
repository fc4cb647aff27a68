// What a cluster's workers will take of this machine's memory, and whether it fits: arithmetic
// only. For workers on the CPU; on a GPU each worker plans its own card (engine/runtime/
// memory_plan.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "common/base/host_memory.h"
#include "common/base/kv_layout.h"
#include "common/base/model_config.h"

namespace tandem::cli {

// What `tandem up` knows before anything starts.
struct StartInputs {
  ModelConfig model;
  bool dummy = false;             // weights are made up
  DType dtype = DType::kFloat32;  // of weights
  DType kv_dtype = DType::kFloat32;
  bool fp8_weights = false;          // rounded, and kept as `dtype`
  int block_size = 16;               // tokens
  int max_model_len = 0;             // tokens; 0: the model's
  int max_num_seqs = 64;             // in a step
  int max_num_batched_tokens = 512;  // in a step
  int64_t kv_bytes = 0;              // of each worker's pool, as given; 0: chosen here
  int workers = 2;
  int ranks = 1;  // of each; those of split models share no weights
  bool share_weights = true;
  HostMemory memory;
};

struct StartPlan {
  size_t weights = 0;     // one copy
  int copies = 1;         // of the weights
  size_t workspace = 0;   // of each worker: its scratch memory and the process itself, about
  size_t kv_pool = 0;     // of each worker
  int64_t kv_tokens = 0;  // in each pool
  int max_model_len = 0;  // longest sequence, tokens
  size_t total = 0;       // of all processes
  // What an operator should know though it fits: sequences that are cut short.
  std::vector<std::string> warnings;
};

// RESOURCE_EXHAUSTED with all figures where it does not fit, and with each change that alone would
// make it fit; INVALID_ARGUMENT where --max-model-len or the pool cannot be.
absl::StatusOr<StartPlan> PlanStart(const StartInputs& inputs);

// Whether `inputs.workers`, whose pools have `kv_bytes`, fit into what those that run already hold
// and what is left. RESOURCE_EXHAUSTED says how many would.
absl::Status CheckMoreWorkers(const StartInputs& inputs);

// For `tandem up --dry-run`: a table with a row for each worker, and the sum. `threads`: of each.
std::string StartPlanText(const StartInputs& inputs, const StartPlan& plan,
                          const std::vector<std::string>& workers, int threads);

}  // namespace tandem::cli
