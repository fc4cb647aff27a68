#include "cli/report/prometheus_source.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <regex>
#include <utility>

#include "nlohmann/json.hpp"

#include "common/base/status.h"
#include "httplib.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

constexpr double kMostPoints = 120;  // of a line

// Of the variables that Grafana fills in, $job and $model are not chosen here.
std::string Filled(const std::string& expression, double step) {
  const std::string window = fmt::format("{}s", std::max(30.0, std::ceil(2 * step)));
  static const std::regex kInterval(R"(\$__rate_interval)"), kVariable(R"("\$\w+")");
  return std::regex_replace(std::regex_replace(expression, kInterval, window), kVariable, "\".*\"");
}

absl::StatusOr<std::vector<Series>> Read(const std::string& text) {
  const json answer = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!answer.is_object() || answer.value("status", "") != "success") {
    return Internal("it gives no data; is it the address of a Prometheus?");
  }
  std::vector<Series> out;
  for (const json& result : answer.at("data").at("result")) {
    Series series;
    for (const auto& [name, value] : result.at("metric").items())
      series.labels[name] = value.get<std::string>();
    for (const json& point : result.at("values")) {
      const auto& number = point.at(1).get_ref<const std::string&>();
      const double value = std::strtod(number.c_str(), nullptr);
      if (!std::isnan(value)) series.points.push_back({point.at(0).get<double>(), value});
    }
    if (!series.points.empty()) out.push_back(std::move(series));
  }
  return out;
}

}  // namespace

PrometheusSource::PrometheusSource(HttpUrl url, double end, double seconds)
    : url_(std::move(url)),
      start_(end - seconds),
      end_(end),
      step_(std::max(1.0, seconds / kMostPoints)) {}

absl::StatusOr<std::vector<Series>> PrometheusSource::Query(const std::string& expression) {
  httplib::Client http(url_.Origin());
  http.set_connection_timeout(std::chrono::seconds(10));
  http.set_read_timeout(std::chrono::seconds(60));
  const httplib::Params params = {{"query", Filled(expression, step_)},
                                  {"start", fmt::format("{:.3f}", start_)},
                                  {"end", fmt::format("{:.3f}", end_)},
                                  {"step", fmt::format("{:.3f}", step_)}};
  const httplib::Result result = http.Post(url_.path + "/api/v1/query_range", params);
  if (!result) {
    return Unavailable("no answer from {}: {}", url_.Origin(), httplib::to_string(result.error()));
  }
  if (result->status != 200) {
    return Internal("{} answers with HTTP {}; is it the address of a Prometheus?", url_.Origin(),
                    result->status);
  }
  try {
    return Read(result->body);
  } catch (const json::exception& error) {
    return Internal("{}: {}; is it the address of a Prometheus?", url_.Origin(), error.what());
  }
}

}  // namespace tandem::cli
