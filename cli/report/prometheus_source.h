// Series from a Prometheus.
#pragma once

#include <string>
#include <vector>

#include "cli/http_url.h"
#include "cli/report/series.h"

namespace tandem::cli {

// Not thread-safe.
class PrometheusSource final : public SeriesSource {
 public:
  // From `end` so far back, both in s.
  PrometheusSource(HttpUrl url, double end, double seconds);

  double start() const override { return start_; }
  double end() const override { return end_; }
  double step() const override { return step_; }
  // UNAVAILABLE where nobody answers, INTERNAL where it is no Prometheus.
  absl::StatusOr<std::vector<Series>> Query(const std::string& expression) override;

 private:
  const HttpUrl url_;
  const double start_;
  const double end_;
  const double step_;
};

}  // namespace tandem::cli
