#include "cli/report/dashboard.h"

#include "nlohmann/json.hpp"

#include "cli/report/dashboard_json.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

DashboardPanel PanelOf(const json& told) {
  DashboardPanel panel;
  panel.title = told.at("title").get<std::string>();
  const std::string type = told.at("type").get<std::string>();
  panel.kind = type == "stat"      ? DashboardPanel::Kind::kFigure
               : type == "heatmap" ? DashboardPanel::Kind::kHeatmap
                                   : DashboardPanel::Kind::kLines;
  panel.unit = told.at("fieldConfig").at("defaults").at("unit").get<std::string>();
  panel.help = told.value("description", "");
  for (const json& target : told.at("targets")) {
    panel.queries.push_back(
        {target.at("expr").get<std::string>(), target.at("legendFormat").get<std::string>()});
  }
  return panel;
}

Dashboard Parse() {
  const json told = json::parse(kLatencyDashboardJson);
  Dashboard board;
  board.title = told.at("title").get<std::string>();
  for (const json& panel : told.at("panels")) {
    if (panel.at("type") == "row") {
      board.rows.push_back({panel.at("title").get<std::string>(), {}});
    } else {
      board.rows.back().panels.push_back(PanelOf(panel));
    }
  }
  return board;
}

}  // namespace

const Dashboard& LatencyDashboard() {
  static const auto* board = new Dashboard(Parse());
  return *board;
}

}  // namespace tandem::cli
