// The latency dashboard of deploy/dashboards, as it was when this was built.
#pragma once

#include <string>
#include <vector>

namespace tandem::cli {

struct PanelQuery {
  std::string expression;  // PromQL
  std::string legend;      // "p50 {{worker}}"; "__auto": the labels
};

struct DashboardPanel {
  enum class Kind { kFigure, kLines, kHeatmap };
  std::string title;
  Kind kind = Kind::kLines;
  std::string unit;  // as Grafana calls it: s, percentunit, Bps, ...
  std::string help;
  std::vector<PanelQuery> queries;
};

struct DashboardRow {
  std::string title;
  std::vector<DashboardPanel> panels;
};

struct Dashboard {
  std::string title;
  std::vector<DashboardRow> rows;
};

// Made once.
const Dashboard& LatencyDashboard();

}  // namespace tandem::cli
