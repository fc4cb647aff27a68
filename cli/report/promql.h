// As much of PromQL as the dashboards are written in, evaluated over pages that were read by
// oneself: selectors, rate, increase, histogram_quantile, clamp_min, time, sum, max, avg and count
// with `by`, + - * /, numbers. Pure.
//
// What $variables choose is not narrowed down, as a label that is not there matches ".*". A rate is
// that of the last kRateMoments moments; its window, which says for how long a Prometheus looks
// back, is passed over.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "cli/report/samples.h"

namespace tandem::cli {

inline constexpr size_t kRateMoments = 5;

// For each combination of labels the values by moment, NaN where there is none. INVALID_ARGUMENT
// for what is not understood.
absl::StatusOr<std::vector<SampledSeries>> EvaluatePromQl(const std::string& expression,
                                                          const Samples& samples);

}  // namespace tandem::cli
