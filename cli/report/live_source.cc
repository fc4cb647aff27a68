#include "cli/report/live_source.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "absl/time/clock.h"

#include "cli/report/promql.h"
#include "common/base/status.h"
#include "httplib.h"

namespace tandem::cli {
namespace {

constexpr int kPages = 30;

absl::StatusOr<std::string> ReadMetrics(const std::string& address) {
  httplib::Client http("http://" + address);
  http.set_connection_timeout(std::chrono::seconds(5));
  http.set_read_timeout(std::chrono::seconds(5));
  const httplib::Result result = http.Get("/metrics");
  if (!result) return Unavailable("{}: {}", address, httplib::to_string(result.error()));
  if (result->status != 200) {
    return Unavailable("{}: HTTP {} for /metrics", address, result->status);
  }
  return result->body;
}

}  // namespace

absl::StatusOr<std::unique_ptr<LiveSource>> LiveSource::Collect(
    const std::vector<std::string>& addresses, absl::Duration duration) {
  std::unique_ptr<LiveSource> source(new LiveSource);
  const absl::Time start = absl::Now();
  for (int i = 0; i <= kPages; ++i) {
    absl::SleepFor(start + duration * i / kPages - absl::Now());
    source->samples_.Begin(absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch()));
    for (const std::string& address : addresses) {
      const absl::StatusOr<std::string> page = ReadMetrics(address);
      if (page.ok()) {
        source->samples_.AddPage(*page);
      } else if (i == 0) {
        return page.status();
      }
    }
  }
  return source;
}

double LiveSource::step() const { return (end() - start()) / kPages; }

absl::StatusOr<std::vector<Series>> LiveSource::Query(const std::string& expression) {
  TANDEM_ASSIGN_OR_RETURN(std::vector<SampledSeries> found, EvaluatePromQl(expression, samples_));
  std::vector<Series> out;
  for (SampledSeries& from : found) {
    Series series{std::move(from.labels), {}};
    for (size_t i = 0; i < from.values.size(); ++i) {
      if (!std::isnan(from.values[i])) {
        series.points.push_back({samples_.times()[i], from.values[i]});
      }
    }
    if (!series.points.empty()) out.push_back(std::move(series));
  }
  return out;
}

}  // namespace tandem::cli
