// A benchmark as a page with plots. Pure.
#pragma once

#include <span>
#include <string>

#include "nlohmann/json.hpp"

#include "cli/bench/metrics.h"
#include "cli/bench/report.h"

namespace tandem::cli {

// Percentile curves, histograms, what happened over time, and a table of every figure of `json`
// (ReportJson), beside those of another run, `other`, that is called `other_name`. Of many requests
// the timeline shows some, evenly chosen.
std::string RenderHtml(const BenchSetup& setup, const BenchMetrics& metrics,
                       std::span<const RequestRecord> records, const nlohmann::ordered_json& json,
                       const std::string& other_name = "",
                       const nlohmann::ordered_json& other = nullptr);

}  // namespace tandem::cli
