// The flags of `tandem plan`, and what they describe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "cli/plan/planner.h"
#include "common/config/flags.h"

namespace tandem::cli {

struct PlanFlags {
  std::string model;
  std::string quantisation = "bf16";
  std::string kv_cache_dtype = "auto";

  std::string card;
  int cards = 4;
  std::optional<double> read_gb, tflops, link_gb;
  int64_t memory = 0;
  std::string bench;
  int cores = 0;
  std::optional<double> keep_read, keep_product, keep_attention, step_overhead_us;

  int input_len = 2048;
  int output_len = 512;
  double range_ratio = 0;
  double prefix_share = 0;
  int num_prefixes = 8;
  std::string trace_file;
  double length_scale = 1;
  int trace_block_tokens = 512;
  std::optional<double> request_rate;
  std::string arrival = "poisson";
  double burstiness = 1;
  std::optional<uint64_t> num_prompts;
  uint64_t seed = 0;
  std::vector<std::string> goodput;

  int block_size = 16;
  int max_model_len = 0;
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  double target_step_ms = -1;
  double memory_utilization = 0.9;
  int64_t kv_cache_bytes = 0;

  bool search = true;
  bool json = false;
  bool progress = true;

  void AddTo(FlagSet* flags);
  // INVALID_ARGUMENT names the flag.
  absl::Status Check() const;
};

// INVALID_ARGUMENT names flag, file or field; FAILED_PRECONDITION says with figures what does not
// fit.
absl::StatusOr<PlanTask> MakeTask(const PlanFlags& flags);

}  // namespace tandem::cli
