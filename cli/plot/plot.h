// Plots as SVG. Pure; every text that is given is escaped.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace tandem::cli {

// `text` as it stands in HTML and in its attributes.
std::string HtmlText(std::string_view text);

// How a number of an axis is written: "12 ms".
using AxisText = std::function<std::string(double)>;

struct PlotAxes {
  AxisText x;
  AxisText y;
  // Where the data does not say: else from the least to the greatest x, and from 0 to the greatest
  // y.
  std::optional<double> x_from;
  std::optional<double> x_to;
};

struct PlotLine {
  struct Point {
    double x = 0;
    double y = 0;
  };
  std::string name;  // in the legend; "" for none
  std::vector<Point> points;
};
std::string LinePlot(std::span<const PlotLine> lines, const PlotAxes& axes);

// Bars of equal width that touch. There is one bound more than there are counts: counts[i] lies
// between bounds[i] and bounds[i + 1].
struct Histogram {
  std::vector<double> bounds;
  std::vector<double> counts;
};
// `bars` of them from the least value to the greatest; of the greatest hundredth all is in the last
// one.
Histogram MakeHistogram(std::vector<double> values, int bars);
std::string HistogramPlot(const Histogram& histogram, const PlotAxes& axes);

// A column for each moment: how often a value between two bounds was seen then, as shades.
struct Heatmap {
  struct Cell {
    double x = 0;  // where the cell ends
    size_t row = 0;
    double count = 0;
  };
  double cell_width = 1;           // in x
  std::vector<double> row_bounds;  // upper ones, growing
  std::vector<Cell> cells;
};
std::string HeatmapPlot(const Heatmap& heatmap, const PlotAxes& axes);

// A row for each of some spans of time, each in parts that follow one another.
struct TimelineRow {
  std::vector<double> bounds;  // of its parts: one more than there are parts
  bool failed = false;
  std::string title;  // shown where a mouse rests on it
};
std::string TimelinePlot(std::span<const TimelineRow> rows, std::span<const std::string> parts,
                         const PlotAxes& axes);

}  // namespace tandem::cli
