// A dashboard as text and as a page. Pure, but for what the source does.
#pragma once

#include <string>

#include "absl/status/statusor.h"

#include "cli/report/dashboard.h"
#include "cli/report/series.h"

namespace tandem::cli {

// A value in a unit as Grafana calls it: "12.3 ms", "45 %", "1.2 GB/s".
std::string ValueText(double value, const std::string& unit);

struct DashboardReport {
  // Each line of each panel: what it is now, its lowest and its highest value. Fits 80 columns but
  // for long names.
  std::string text;
  std::string html;
};
// Fails with the first query that does.
absl::StatusOr<DashboardReport> MakeDashboardReport(const Dashboard& board, SeriesSource* source);

}  // namespace tandem::cli
