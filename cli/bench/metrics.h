// From the records of a run to its figures. Pure.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "cli/bench/recorder.h"
#include "common/base/stage.h"

namespace tandem::cli {

// Of `sorted` values, p in [0, 100], between two values by straight line as numpy does; 0 of none.
double Percentile(std::span<const double> sorted, double p);

struct Distribution {
  double mean = 0;
  double median = 0;
  double deviation = 0;             // standard, of the whole population
  std::vector<double> percentiles;  // in the order in which they were asked for
};
Distribution Summarize(std::vector<double> values, std::span<const double> percentiles);

// A request is good if it stays within all limits that are set.
struct Goodput {
  std::optional<double> ttft_ms, tpot_ms, e2el_ms;
};
// From e.g. {"ttft:500", "tpot:50"}.
absl::StatusOr<Goodput> ParseGoodput(const std::vector<std::string>& limits);

struct Failure {
  int count = 0;
  std::string example;  // the message of the first one
};

struct BenchMetrics {
  double duration_s = 0;
  size_t completed = 0;
  size_t failed = 0;
  // Of the completed requests.
  int64_t input_tokens = 0;
  int64_t cached_tokens = 0;  // input that the server did not compute again
  int64_t output_tokens = 0;
  std::optional<size_t> good;
  double peak_output_tokens_per_s = 0;  // the best second
  size_t peak_concurrency = 0;          // requests
  // Milliseconds. From the intended time of sending to the first token and to the end; between
  // messages; per token after the first.
  Distribution ttft, e2el, itl, tpot;
  std::vector<Distribution> ttft_of_turn;   // where conversations have more than one
  Distribution send_delay;                  // intended to sent: what the client itself added
  Distribution refusal;                     // intended to RESOURCE_EXHAUSTED
  size_t refused = 0;                       // requests that ended so
  StageTimes stages;                        // means of what the server said
  std::map<std::string, Failure> failures;  // by status code

  double PerSecond(double amount) const { return duration_s > 0 ? amount / duration_s : 0; }
};

BenchMetrics Measure(std::span<const RequestRecord> records, absl::Duration duration,
                     const std::optional<Goodput>& goodput, std::span<const double> percentiles);

}  // namespace tandem::cli
