// How a benchmark's figures are shown: the block of text and the JSON keys that users of
// `vllm bench serve` know, and what Tandem has to add. Pure.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

#include "cli/bench/metrics.h"

namespace tandem::cli {

inline constexpr char kTandemBackend[] = "tandem-grpc";
inline constexpr char kOpenAiBackend[] = "openai-chat";

// What was run, for the record.
struct BenchSetup {
  std::string date;  // 20260131-235959
  std::string backend = kTandemBackend;
  std::string model;
  std::string scenario;
  size_t num_prompts = 0;   // conversations
  double request_rate = 0;  // req/s; 0: as fast as answers come
  double burstiness = 1;
  int max_concurrency = 0;  // 0: no limit
  bool static_batches = false;
  std::vector<std::string> metrics = {"ttft", "tpot", "itl", "e2el"};  // to show in detail
  std::vector<double> percentiles = {99};                              // [0, 100]
};

// Of those that exist: ttft, tpot, itl, e2el. INVALID_ARGUMENT otherwise.
absl::StatusOr<std::vector<std::string>> ParseMetricNames(const std::string& comma_separated);
absl::StatusOr<std::vector<double>> ParsePercentiles(const std::string& comma_separated);

std::string RenderReport(const BenchSetup& setup, const BenchMetrics& metrics);
// This run beside one of the same requests in another way or elsewhere, which is called `name`: a
// table of both, with what the first is of the second.
std::string RenderComparison(const BenchSetup& setup, const BenchMetrics& run,
                             const BenchMetrics& other, const std::string& name);

nlohmann::ordered_json ReportJson(const BenchSetup& setup, const BenchMetrics& metrics);
// Adds what is known of each request: input_lens, output_lens, ttfts, itls (s), errors.
void AddDetails(std::span<const RequestRecord> records, nlohmann::ordered_json* json);

}  // namespace tandem::cli
