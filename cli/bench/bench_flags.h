// The flags of `tandem bench`, and the plan that they make.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "cli/bench/bench_client.h"
#include "cli/bench/metrics.h"
#include "cli/bench/report.h"
#include "cli/bench/runner.h"
#include "cli/bench/workload.h"
#include "cli/server_flags.h"
#include "common/config/flags.h"

namespace tandem::cli {

struct BenchFlags {
  ServerFlags server;
  std::string api = "tandem";
  std::string url;
  std::string model;
  std::string scenario = "random";
  std::optional<uint64_t> num_prompts;
  int input_len = 1024;
  int output_len = 128;
  double range_ratio = 0;
  int prefix_len = 1024;
  int num_prefixes = 1;
  int first_tokens = 4096;
  int second_tokens = 512;
  std::string trace_file;
  double trace_speed = 1;
  double length_scale = 1;
  int trace_block_tokens = 512;

  std::optional<double> request_rate;
  std::string arrival = "poisson";
  double burstiness = 1;
  std::optional<uint64_t> max_concurrency;
  bool static_batches = false;
  bool compare_static = false;
  std::string compare_url;

  uint64_t num_warmups = 1;
  double timeout_s = 600;
  int connections = 4;
  uint64_t seed = 0;
  double temperature = 0;
  bool ignore_eos = true;
  std::string cache_salt;

  std::vector<std::string> goodput;
  std::string percentile_metrics = "ttft,tpot,itl,e2el";
  std::string metric_percentiles = "99";
  bool json = false;
  bool save_result = false;
  bool save_detailed = false;
  std::string result_dir = ".";
  std::string result_filename;
  std::string html;
  bool progress = true;

  void AddTo(FlagSet* flags);
  // INVALID_ARGUMENT names the flag.
  absl::Status Check() const;
  // req/s; 0: a closed loop, or a trace's own times.
  double RequestRate() const;
};

// What is to be run. Arrivals are set, and whatever the model cannot take is out.
struct BenchPlan {
  std::vector<Conversation> workload;
  std::vector<Conversation> warm_up;
  RunnerOptions runner;
  BenchSetup setup;
  std::optional<Goodput> goodput;
  size_t left_out = 0;  // of a trace: longer than the model's limit
};
absl::StatusOr<BenchPlan> MakePlan(const BenchFlags& flags, const BenchModel& model);

}  // namespace tandem::cli
