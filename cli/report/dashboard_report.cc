#include "cli/report/dashboard_report.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "fmt/format.h"

#include "cli/plot/page.h"
#include "cli/plot/plot.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

// A line of a panel: what its legend says, and its points.
using NamedLines = std::vector<PlotLine>;

std::string TimeAt(const char* format, double seconds) {
  return absl::FormatTime(format, absl::UnixEpoch() + absl::Seconds(seconds),
                          absl::LocalTimeZone());
}

// "p50 {{worker}}" with what the labels say.
std::string LegendOf(const std::string& form, const Series& series, const std::string& title) {
  std::string out;
  if (form == "__auto") {
    for (const auto& [name, value] : series.labels) {
      if (name == "__name__") continue;
      out += fmt::format("{}{} {}", out.empty() ? "" : ", ", name, value);
    }
    return out.empty() ? title : out;
  }
  for (size_t at = 0; at < form.size();) {
    const size_t open = form.find("{{", at);
    const size_t close = open == std::string::npos ? open : form.find("}}", open);
    if (close == std::string::npos) return out + form.substr(at);
    out += form.substr(at, open - at);
    std::string label = form.substr(open + 2, close - open - 2);
    std::erase(label, ' ');
    const auto found = series.labels.find(label);
    if (found != series.labels.end()) out += found->second;
    at = close + 2;
  }
  return out;
}

class DashboardPrinter {
 public:
  DashboardPrinter(const Dashboard& board, SeriesSource* source)
      : board_(board), source_(source), page_(board.title, Span()) {
    const char* clock = source->end() - source->start() < 600 ? "%H:%M:%S" : "%H:%M";
    axes_.x = [clock](double at) { return TimeAt(clock, at); };
    axes_.x_from = source->start();
    axes_.x_to = source->end();
  }

  absl::StatusOr<DashboardReport> Print() {
    text_ = fmt::format("{}, {}\n", board_.title, Span());
    AddLine("", "now", "lowest", "highest");
    for (const DashboardRow& row : board_.rows) {
      text_ += "\n" + row.title + "\n";
      page_.Section(row.title);
      for (const DashboardPanel& panel : row.panels) TANDEM_RETURN_IF_ERROR(Add(panel));
    }
    return DashboardReport{std::move(text_), page_.Html()};
  }

 private:
  std::string Span() const {
    return TimeAt("%Y-%m-%d %H:%M:%S", source_->start()) + " to " +
           TimeAt("%H:%M:%S", source_->end());
  }

  void AddLine(const std::string& name, const std::string& now, const std::string& lowest,
               const std::string& highest) {
    text_ += fmt::format("    {:<37} {:>11} {:>11} {:>11}\n", name, now, lowest, highest);
  }

  absl::Status Add(const DashboardPanel& panel) {
    NamedLines lines;
    for (const PanelQuery& query : panel.queries) {
      TANDEM_ASSIGN_OR_RETURN(std::vector<Series> found, source_->Query(query.expression));
      for (Series& series : found) {
        std::string name = LegendOf(query.legend, series, panel.title);
        lines.push_back({std::move(name), std::move(series.points)});
      }
    }
    if (lines.empty()) {
      text_ += fmt::format("  {}: no data\n", panel.title);
      page_.Plot(panel.title, "", "no data");
    } else if (panel.kind == DashboardPanel::Kind::kHeatmap) {
      AddHeatmap(panel, lines);
    } else {
      AddLines(panel, lines);
    }
    return absl::OkStatus();
  }

  void AddLines(const DashboardPanel& panel, NamedLines lines) {
    const bool figure = panel.kind == DashboardPanel::Kind::kFigure;
    if (!figure) text_ += "  " + panel.title + "\n";
    for (const PlotLine& line : lines) {
      const auto [low, high] =
          std::minmax_element(line.points.begin(), line.points.end(),
                              [](const auto& a, const auto& b) { return a.y < b.y; });
      AddLine(line.name, ValueText(line.points.back().y, panel.unit), ValueText(low->y, panel.unit),
              ValueText(high->y, panel.unit));
    }
    if (figure) {
      return page_.Figure(panel.title, ValueText(lines[0].points.back().y, panel.unit));
    }
    // Seventeen statuses, of which one ever came, would be seventeen colours.
    const auto flat = [](const PlotLine& line) {
      return std::all_of(line.points.begin(), line.points.end(),
                         [](const auto& point) { return point.y == 0; });
    };
    if (!std::all_of(lines.begin(), lines.end(), flat)) std::erase_if(lines, flat);
    for (PlotLine& line : lines) {
      line.name += " " + ValueText(line.points.back().y, panel.unit);
    }
    page_.Plot(panel.title, LinePlot(lines, Axes(panel)), panel.help);
  }

  // Of cumulative buckets, each line one bound: how many lie between two bounds.
  void AddHeatmap(const DashboardPanel& panel, const NamedLines& lines) {
    std::map<double, std::map<double, double>> counts;  // by bound and time
    for (const PlotLine& line : lines) {
      const double bound = line.name == "+Inf" ? HUGE_VAL : std::strtod(line.name.c_str(), nullptr);
      for (const auto& [at, count] : line.points) counts[bound][at] = count;
    }
    Heatmap heatmap;
    heatmap.cell_width = source_->step();
    std::map<double, double> below;
    for (const auto& [bound, by_time] : counts) {
      for (const auto& [at, count] : by_time) {
        const auto found = below.find(at);
        const double between = count - (found == below.end() ? 0 : found->second);
        if (between > 0) heatmap.cells.push_back({at, heatmap.row_bounds.size(), between});
      }
      heatmap.row_bounds.push_back(bound);
      below = by_time;
    }
    page_.Plot(panel.title, HeatmapPlot(heatmap, Axes(panel)), panel.help);
  }

  PlotAxes Axes(const DashboardPanel& panel) const {
    PlotAxes axes = axes_;
    axes.y = [unit = panel.unit](double value) { return ValueText(value, unit); };
    return axes;
  }

  const Dashboard& board_;
  SeriesSource* const source_;
  PlotAxes axes_;
  std::string text_;
  HtmlPage page_;
};

}  // namespace

std::string ValueText(double value, const std::string& unit) {
  if (std::isnan(value)) return "-";
  if (std::isinf(value)) return "more";
  if (unit == "percentunit") return fmt::format("{:.3g} %", value * 100);
  if (unit == "s" && value < 120) {
    if (value >= 1 || value == 0) return fmt::format("{:.3g} s", value);
    if (value >= 1e-3) return fmt::format("{:.3g} ms", value * 1e3);
    return fmt::format("{:.3g} us", value * 1e6);
  }
  if (unit == "s") return fmt::format("{:.0f} s", value);
  const std::map<std::string, std::string> kSuffixes = {
      {"Bps", "B/s"}, {"bytes", "B"}, {"reqps", "/s"}, {"ops", "/s"}, {"watt", "W"}};
  const auto found = kSuffixes.find(unit);
  const std::string suffix = found == kSuffixes.end() ? "" : found->second;
  struct Prefix {
    double factor;
    const char* name;
  };
  for (const Prefix& prefix : {Prefix{1e9, "G"}, Prefix{1e6, "M"}, Prefix{1e3, "k"}}) {
    if (std::abs(value) >= prefix.factor) {
      return fmt::format("{:.3g} {}{}", value / prefix.factor, prefix.name, suffix);
    }
  }
  const bool spaced = !suffix.empty() && suffix != "/s";
  return fmt::format("{:.3g}{}{}", value, spaced ? " " : "", suffix);
}

absl::StatusOr<DashboardReport> MakeDashboardReport(const Dashboard& board, SeriesSource* source) {
  return DashboardPrinter(board, source).Print();
}

}  // namespace tandem::cli
