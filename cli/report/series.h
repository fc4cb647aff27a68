// Numbers over time: what a query gives.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "cli/plot/plot.h"

namespace tandem::cli {

struct Series {
  std::map<std::string, std::string> labels;
  std::vector<PlotLine::Point> points;  // x: s since 1970; y: never NaN. At least one
};

class SeriesSource {
 public:
  virtual ~SeriesSource() = default;
  // Of the whole span, s since 1970.
  virtual double start() const = 0;
  virtual double end() const = 0;
  virtual double step() const = 0;  // between two points, s
  // `expression` is PromQL as the dashboards have it.
  virtual absl::StatusOr<std::vector<Series>> Query(const std::string& expression) = 0;
};

}  // namespace tandem::cli
