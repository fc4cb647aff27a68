#include "cli/plot/plot.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "fmt/format.h"

namespace tandem::cli {
namespace {

// Pixels.
constexpr double kPlotWidth = 380, kPlotHeight = 170, kLeft = 56, kTop = 6, kBottom = 18;
constexpr int kTicks = 4;
constexpr std::array<const char*, 8> kPlotColours = {"#3274d9", "#e0752d", "#299c46", "#d44a3a",
                                                     "#8f3bb8", "#b3a125", "#1f9ba8", "#7a7a7a"};

const char* PlotColour(size_t i) { return kPlotColours[i % kPlotColours.size()]; }

// From numbers of the data to pixels.
class Frame {
 public:
  Frame(double x_from, double x_to, double y_from, double y_to, double height = kPlotHeight)
      : x_from_(x_from),
        x_to_(x_to > x_from ? x_to : x_from + 1),
        y_from_(y_from),
        y_to_(y_to > y_from ? y_to : y_from + 1),
        height_(height) {}

  double X(double x) const { return kLeft + (x - x_from_) / (x_to_ - x_from_) * Wide(); }
  double Y(double y) const { return bottom() - (y - y_from_) / (y_to_ - y_from_) * Tall(); }
  double Wide() const { return kPlotWidth - kLeft - 8; }
  double Tall() const { return bottom() - kTop; }
  double bottom() const { return height_ - kBottom; }

  // The plot: its scales around and behind `inside`.
  std::string Svg(const PlotAxes& axes, const std::string& inside) const {
    std::string out = fmt::format(R"(<svg viewBox="0 0 {} {}" role="img">)", kPlotWidth, height_);
    for (int i = 0; i <= kTicks && axes.y; ++i) {
      const double y = y_from_ + (y_to_ - y_from_) * i / kTicks;
      out += fmt::format(
          R"(<path d="M{:.1f} {:.1f}H{:.1f}" class="grid"/><text x="{:.1f}" y="{:.1f}" class="y">{}</text>)",
          kLeft, Y(y), kLeft + Wide(), kLeft - 4, Y(y) + 3, HtmlText(axes.y(y)));
    }
    for (int i = 0; i <= kTicks && axes.x; ++i) {
      const double x = x_from_ + (x_to_ - x_from_) * i / kTicks;
      const char* place = i == 0 ? "start" : i == kTicks ? "end" : "middle";
      out += fmt::format(R"(<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>)", X(x),
                         height_ - 4, place, HtmlText(axes.x(x)));
    }
    return out + inside +
           fmt::format(R"(<path d="M{} {}V{}H{:.1f}" class="axis"/></svg>)", kLeft, kTop, bottom(),
                       kLeft + Wide());
  }

 private:
  const double x_from_, x_to_, y_from_, y_to_, height_;
};

std::string Legend(const std::vector<std::pair<std::string, const char*>>& names) {
  std::string out;
  for (const auto& [name, colour] : names) {
    if (name.empty()) continue;
    out += fmt::format(R"(<span><i style="background:{}"></i>{}</span>)", colour, HtmlText(name));
  }
  return out.empty() ? "" : R"(<div class="key">)" + out + "</div>";
}

std::string Rectangle(double x, double y, double width, double height, const std::string& more) {
  return fmt::format(R"(<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" {})", x, y,
                     width, height, more);
}

// At least `top`; its quarters, which the scale names, are short numbers.
double RoundTop(double top) {
  if (!(top > 0) || !std::isfinite(top)) return 0;
  const double decade = std::pow(10, std::floor(std::log10(top)));
  for (const double factor : {1, 2, 4, 6, 8}) {
    if (top <= factor * decade) return factor * decade;
  }
  return 10 * decade;
}

}  // namespace

std::string HtmlText(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '"') {
      out += "&quot;";
    } else if (static_cast<unsigned char>(c) < ' ' && c != '\n' && c != '\t') {
      out += '?';  // no page may hold these
    } else {
      out += c;
    }
  }
  return out;
}

std::string LinePlot(std::span<const PlotLine> lines, const PlotAxes& axes) {
  double from = HUGE_VAL, to = -HUGE_VAL, top = 0;
  for (const PlotLine& line : lines) {
    for (const auto& [x, y] : line.points) {
      from = std::min(from, x);
      to = std::max(to, x);
      top = std::max(top, y);
    }
  }
  if (from > to) from = to = 0;
  const Frame frame(axes.x_from.value_or(from), axes.x_to.value_or(to), 0, RoundTop(top));
  std::string inside;
  std::vector<std::pair<std::string, const char*>> names;
  for (size_t i = 0; i < lines.size(); ++i) {
    std::string way;
    for (const auto& [x, y] : lines[i].points) {
      way += fmt::format("{:.1f},{:.1f} ", frame.X(x), frame.Y(y));
    }
    if (lines[i].points.size() == 1) way += way;  // a dot, by the round ends of lines
    inside +=
        fmt::format(R"(<polyline points="{}" class="line" stroke="{}"/>)", way, PlotColour(i));
    names.emplace_back(lines[i].name, PlotColour(i));
  }
  return frame.Svg(axes, inside) + Legend(names);
}

Histogram MakeHistogram(std::vector<double> values, int bars) {
  Histogram out;
  if (values.empty()) return out;
  std::sort(values.begin(), values.end());
  const double from = values.front();
  // One straggler would make all the others one bar.
  double to = values[(values.size() - 1) * 99 / 100];
  if (!(to > from)) to = values.back();
  if (!(to > from)) to = from + 1;
  const double width = (to - from) / bars;
  for (int i = 0; i <= bars; ++i) out.bounds.push_back(from + width * i);
  out.counts.resize(static_cast<size_t>(bars));
  for (const double value : values) {
    const auto bar = static_cast<int>((value - from) / width);
    ++out.counts[static_cast<size_t>(std::clamp(bar, 0, bars - 1))];
  }
  return out;
}

std::string HistogramPlot(const Histogram& histogram, const PlotAxes& axes) {
  const auto& [bounds, counts] = histogram;
  if (counts.empty()) return Frame(0, 1, 0, 1).Svg({}, "");
  const double top = *std::max_element(counts.begin(), counts.end());
  const Frame frame(bounds.front(), bounds.back(), 0, RoundTop(top));
  std::string inside;
  for (size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] <= 0) continue;
    const double x = frame.X(bounds[i]), y = frame.Y(counts[i]);
    inside += Rectangle(x, y, frame.X(bounds[i + 1]) - x, frame.bottom() - y,
                        fmt::format(R"(fill="{}" stroke="#fff"/>)", PlotColour(0)));
  }
  return frame.Svg(axes, inside);
}

std::string HeatmapPlot(const Heatmap& heatmap, const PlotAxes& axes) {
  if (heatmap.cells.empty()) return Frame(0, 1, 0, 1).Svg({}, "");
  size_t low = heatmap.cells[0].row, high = low;
  double from = HUGE_VAL, to = -HUGE_VAL, most = 0;
  for (const Heatmap::Cell& cell : heatmap.cells) {
    low = std::min(low, cell.row);
    high = std::max(high, cell.row);
    from = std::min(from, cell.x - heatmap.cell_width);
    to = std::max(to, cell.x);
    most = std::max(most, cell.count);
  }
  const auto bottom = static_cast<double>(low), top = static_cast<double>(high + 1);
  const Frame frame(axes.x_from.value_or(from), axes.x_to.value_or(to), bottom, top);
  std::string inside;
  for (const Heatmap::Cell& cell : heatmap.cells) {
    const double x = frame.X(cell.x - heatmap.cell_width);
    const double y = frame.Y(static_cast<double>(cell.row + 1));
    inside += Rectangle(x, y, frame.X(cell.x) - x + 0.2, frame.Tall() / (top - bottom),
                        fmt::format(R"(fill="{}" fill-opacity="{:.2f}"/>)", PlotColour(1),
                                    0.15 + 0.85 * cell.count / most));
  }
  PlotAxes scaled = axes;
  // Rows are no numbers of their own: their bounds are written beside them.
  scaled.y = [&](double row) {
    const auto i = static_cast<size_t>(std::llround(row));
    if (i == 0) return axes.y(0);
    return axes.y(heatmap.row_bounds[std::min(i, heatmap.row_bounds.size()) - 1]);
  };
  return frame.Svg(scaled, inside);
}

std::string TimelinePlot(std::span<const TimelineRow> rows, std::span<const std::string> parts,
                         const PlotAxes& axes) {
  constexpr double kRow = 3, kMostTall = 900;
  double from = HUGE_VAL, to = -HUGE_VAL;
  for (const TimelineRow& row : rows) {
    from = std::min(from, row.bounds.front());
    to = std::max(to, row.bounds.back());
  }
  if (from > to) from = to = 0;
  const double tall =
      std::clamp(kRow * static_cast<double>(rows.size()), kPlotHeight - kTop - kBottom, kMostTall);
  const Frame frame(axes.x_from.value_or(from), axes.x_to.value_or(to), 0,
                    static_cast<double>(rows.size()), tall + kTop + kBottom);
  const double each = frame.Tall() / static_cast<double>(std::max<size_t>(rows.size(), 1));
  std::string inside;
  for (size_t i = 0; i < rows.size(); ++i) {
    const TimelineRow& row = rows[i];
    const double y = kTop + each * static_cast<double>(i);
    inside += "<g><title>" + HtmlText(row.title) + "</title>";
    for (size_t part = 0; part + 1 < row.bounds.size(); ++part) {
      const double x = frame.X(row.bounds[part]);
      inside += Rectangle(x, y, std::max(0.3, frame.X(row.bounds[part + 1]) - x), each * 0.8,
                          fmt::format(R"(fill="{}"/>)", row.failed ? "#d44a3a" : PlotColour(part)));
    }
    inside += "</g>";
  }
  std::vector<std::pair<std::string, const char*>> names;
  for (size_t i = 0; i < parts.size(); ++i) names.emplace_back(parts[i], PlotColour(i));
  const bool failed = std::any_of(rows.begin(), rows.end(), [](const auto& r) { return r.failed; });
  if (failed) names.emplace_back("failed", "#d44a3a");
  PlotAxes without_y = axes;
  without_y.y = nullptr;
  return frame.Svg(without_y, inside) + Legend(names);
}

}  // namespace tandem::cli
