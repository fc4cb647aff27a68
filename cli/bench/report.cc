#include "cli/bench/report.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <string_view>
#include <utility>

#include "fmt/format.h"

#include "cli/table.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

using nlohmann::ordered_json;

constexpr int kWidth = 50;

struct MetricInfo {
  std::string_view name;
  std::string_view label;
  std::string_view title;
  Distribution BenchMetrics::*values;
};

constexpr std::array<MetricInfo, 4> kMetrics = {{
    {"ttft", "TTFT", "Time to First Token", &BenchMetrics::ttft},
    {"tpot", "TPOT", "Time per Output Token (excl. 1st token)", &BenchMetrics::tpot},
    {"itl", "ITL", "Inter-token Latency", &BenchMetrics::itl},
    {"e2el", "E2EL", "End-to-end Latency", &BenchMetrics::e2el},
}};

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> out;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    out.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

std::string Title(std::string_view title, char fill) {
  return fill == '=' ? fmt::format("{:=^{}}\n", title, kWidth)
                     : fmt::format("{:-^{}}\n", title, kWidth);
}

std::string Count(std::string_view label, int64_t value) {
  return fmt::format("{:<40} {:<10}\n", fmt::format("{}:", label), value);
}

std::string Figure(std::string_view label, double value) {
  return fmt::format("{:<40} {:<10.2f}\n", fmt::format("{}:", label), value);
}

std::string Section(std::string_view title, std::string_view label, const Distribution& values,
                    std::span<const double> percentiles) {
  std::string out = Title(title, '-');
  out += Figure(fmt::format("Mean {} (ms)", label), values.mean);
  out += Figure(fmt::format("Median {} (ms)", label), values.median);
  for (size_t i = 0; i < percentiles.size(); ++i) {
    out += Figure(fmt::format("P{} {} (ms)", percentiles[i], label), values.percentiles[i]);
  }
  return out;
}

void AddDistribution(std::string_view name, const Distribution& values,
                     std::span<const double> percentiles, ordered_json* out) {
  (*out)[fmt::format("mean_{}_ms", name)] = values.mean;
  (*out)[fmt::format("median_{}_ms", name)] = values.median;
  (*out)[fmt::format("std_{}_ms", name)] = values.deviation;
  for (size_t i = 0; i < percentiles.size(); ++i) {
    (*out)[fmt::format("p{}_{}_ms", percentiles[i], name)] = values.percentiles[i];
  }
}

// What the server's own stages say; empty where it said nothing.
std::string StagesSection(const BenchMetrics& metrics) {
  if (metrics.stages[Stage::kTotal] <= 0) return "";
  std::string out = Title("Server's Stages", '-');
  for (const StageInfo& info : kStages) {
    out += Figure(fmt::format("Mean {} (ms)", info.name), metrics.stages[info.stage]);
  }
  return out;
}

std::string FailuresSection(const BenchMetrics& metrics) {
  if (metrics.failures.empty()) return "";
  std::string out = Title("Failed Requests", '-');
  for (const auto& [code, failure] : metrics.failures) {
    out += Count(code, failure.count);
    out += fmt::format("  e.g. {}\n", failure.example);
  }
  return out;
}

}  // namespace

absl::StatusOr<std::vector<std::string>> ParseMetricNames(const std::string& comma_separated) {
  std::vector<std::string> names = Split(comma_separated);
  for (const std::string& name : names) {
    const auto is_it = [&](const MetricInfo& info) { return info.name == name; };
    if (std::none_of(kMetrics.begin(), kMetrics.end(), is_it)) {
      return InvalidArgument("--percentile-metrics: '{}' is not one of ttft, tpot, itl, e2el",
                             name);
    }
  }
  return names;
}

absl::StatusOr<std::vector<double>> ParsePercentiles(const std::string& comma_separated) {
  std::vector<double> out;
  for (const std::string& text : Split(comma_separated)) {
    double value = 0;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || !(value >= 0 && value <= 100)) {
      return InvalidArgument("--metric-percentiles: '{}' is not in [0, 100]; give e.g. 50,90,99",
                             text);
    }
    out.push_back(value);
  }
  return out;
}

std::string RenderReport(const BenchSetup& setup, const BenchMetrics& metrics) {
  std::string out = Title(" Serving Benchmark Result ", '=');
  out += Count("Successful requests", static_cast<int64_t>(metrics.completed));
  out += Count("Failed requests", static_cast<int64_t>(metrics.failed));
  if (setup.max_concurrency > 0) {
    out += Count(setup.static_batches ? "Static batch size" : "Maximum request concurrency",
                 setup.max_concurrency);
  }
  if (setup.request_rate > 0) out += Figure("Request rate configured (RPS)", setup.request_rate);
  out += Figure("Benchmark duration (s)", metrics.duration_s);
  out += Count("Total input tokens", metrics.input_tokens);
  out += Count("Cached input tokens", metrics.cached_tokens);
  out += Count("Total generated tokens", metrics.output_tokens);
  const auto completed = static_cast<double>(metrics.completed);
  const auto output = static_cast<double>(metrics.output_tokens);
  const auto total = output + static_cast<double>(metrics.input_tokens);
  out += Figure("Request throughput (req/s)", metrics.PerSecond(completed));
  if (metrics.good) {
    out += Figure("Request goodput (req/s)", metrics.PerSecond(static_cast<double>(*metrics.good)));
  }
  out += Figure("Output token throughput (tok/s)", metrics.PerSecond(output));
  out += Figure("Peak output token throughput (tok/s)", metrics.peak_output_tokens_per_s);
  out += Count("Peak concurrent requests", static_cast<int64_t>(metrics.peak_concurrency));
  out += Figure("Total token throughput (tok/s)", metrics.PerSecond(total));
  for (const std::string& name : setup.metrics) {
    for (const MetricInfo& info : kMetrics) {
      if (info.name != name) continue;
      out += Section(info.title, info.label, metrics.*info.values, setup.percentiles);
    }
  }
  for (size_t turn = 0; turn < metrics.ttft_of_turn.size(); ++turn) {
    out += Section(fmt::format("Time to First Token, Turn {}", turn + 1),
                   fmt::format("TTFT turn {}", turn + 1), metrics.ttft_of_turn[turn],
                   setup.percentiles);
  }
  out += StagesSection(metrics);
  out += Section("Client: Intended to Sent", "delay", metrics.send_delay, setup.percentiles);
  if (metrics.refused > 0) {
    out += Section("Time to a Refusal (RESOURCE_EXHAUSTED)", "refusal", metrics.refusal,
                   setup.percentiles);
  }
  out += FailuresSection(metrics);
  return out + std::string(kWidth, '=') + "\n";
}

std::string RenderComparison(const BenchSetup& setup, const BenchMetrics& run,
                             const BenchMetrics& other, const std::string& name) {
  std::vector<std::vector<std::string>> rows = {{"", setup.backend, name, "ratio"}};
  const auto count = [&](std::string label, int64_t of_run, int64_t of_other) {
    rows.push_back({std::move(label), fmt::format("{}", of_run), fmt::format("{}", of_other)});
  };
  const auto figure = [&](std::string label, double of_run, double of_other) {
    rows.push_back({std::move(label), fmt::format("{:.2f}", of_run),
                    fmt::format("{:.2f}", of_other),
                    of_other > 0 ? fmt::format("{:.2f}", of_run / of_other) : "-"});
  };
  const auto section = [&](const std::string& label, const Distribution& of_run,
                           const Distribution& of_other) {
    figure(fmt::format("Median {} (ms)", label), of_run.median, of_other.median);
    for (size_t i = 0; i < setup.percentiles.size(); ++i) {
      figure(fmt::format("P{} {} (ms)", setup.percentiles[i], label), of_run.percentiles[i],
             of_other.percentiles[i]);
    }
  };
  const auto per_second = [&](std::string label, auto amount) {
    figure(std::move(label), run.PerSecond(static_cast<double>(amount(run))),
           other.PerSecond(static_cast<double>(amount(other))));
  };
  count("Successful requests", static_cast<int64_t>(run.completed),
        static_cast<int64_t>(other.completed));
  count("Failed requests", static_cast<int64_t>(run.failed), static_cast<int64_t>(other.failed));
  count("Total input tokens", run.input_tokens, other.input_tokens);
  count("Cached input tokens", run.cached_tokens, other.cached_tokens);
  count("Total generated tokens", run.output_tokens, other.output_tokens);
  figure("Benchmark duration (s)", run.duration_s, other.duration_s);
  per_second("Request throughput (req/s)", [](const auto& metrics) { return metrics.completed; });
  per_second("Output token throughput (tok/s)",
             [](const auto& metrics) { return metrics.output_tokens; });
  for (const std::string& metric : setup.metrics) {
    for (const MetricInfo& info : kMetrics) {
      if (info.name == metric)
        section(std::string(info.label), run.*info.values, other.*info.values);
    }
  }
  for (size_t turn = 0; turn < std::min(run.ttft_of_turn.size(), other.ttft_of_turn.size());
       ++turn) {
    section(fmt::format("TTFT turn {}", turn + 1), run.ttft_of_turn[turn],
            other.ttft_of_turn[turn]);
  }
  return RenderTable(rows);
}

ordered_json ReportJson(const BenchSetup& setup, const BenchMetrics& metrics) {
  ordered_json out;
  out["date"] = setup.date;
  out["backend"] = setup.backend;
  out["model_id"] = setup.model;
  out["scenario"] = setup.scenario;
  out["num_prompts"] = setup.num_prompts;
  if (setup.request_rate > 0) {
    out["request_rate"] = setup.request_rate;
  } else {
    out["request_rate"] = "inf";
  }
  out["burstiness"] = setup.burstiness;
  out["max_concurrency"] =
      setup.max_concurrency > 0 ? ordered_json(setup.max_concurrency) : ordered_json();
  out["static_batches"] = setup.static_batches;
  out["duration"] = metrics.duration_s;
  out["completed"] = metrics.completed;
  out["failed"] = metrics.failed;
  out["total_input_tokens"] = metrics.input_tokens;
  out["total_cached_tokens"] = metrics.cached_tokens;
  out["total_output_tokens"] = metrics.output_tokens;
  const auto output = static_cast<double>(metrics.output_tokens);
  out["request_throughput"] = metrics.PerSecond(static_cast<double>(metrics.completed));
  out["request_goodput"] = metrics.good
                               ? ordered_json(metrics.PerSecond(static_cast<double>(*metrics.good)))
                               : ordered_json();
  out["output_throughput"] = metrics.PerSecond(output);
  out["total_token_throughput"] =
      metrics.PerSecond(output + static_cast<double>(metrics.input_tokens));
  out["max_output_tokens_per_s"] = metrics.peak_output_tokens_per_s;
  out["max_concurrent_requests"] = metrics.peak_concurrency;
  for (const MetricInfo& info : kMetrics) {
    AddDistribution(info.name, metrics.*info.values, setup.percentiles, &out);
  }
  for (size_t turn = 0; turn < metrics.ttft_of_turn.size(); ++turn) {
    AddDistribution(fmt::format("ttft_turn{}", turn + 1), metrics.ttft_of_turn[turn],
                    setup.percentiles, &out);
  }
  AddDistribution("send_delay", metrics.send_delay, setup.percentiles, &out);
  if (metrics.refused > 0) {
    AddDistribution("refusal", metrics.refusal, setup.percentiles, &out);
  }
  for (const StageInfo& info : kStages) {
    out[fmt::format("mean_stage_{}_ms", info.name)] = metrics.stages[info.stage];
  }
  out["errors_by_status"] = ordered_json::object();
  for (const auto& [code, failure] : metrics.failures) {
    out["errors_by_status"][code] = failure.count;
  }
  return out;
}

void AddDetails(std::span<const RequestRecord> records, ordered_json* json) {
  for (const char* key : {"input_lens", "output_lens", "ttfts", "itls", "errors"}) {
    (*json)[key] = ordered_json::array();
  }
  for (const RequestRecord& record : records) {
    (*json)["input_lens"].push_back(record.prompt_tokens);
    (*json)["output_lens"].push_back(record.output_tokens());
    (*json)["ttfts"].push_back(
        record.arrivals.empty()
            ? 0.0
            : absl::ToDoubleSeconds(record.arrivals.front().at - record.intended));
    ordered_json gaps = ordered_json::array();
    for (size_t i = 1; i < record.arrivals.size(); ++i) {
      gaps.push_back(absl::ToDoubleSeconds(record.arrivals[i].at - record.arrivals[i - 1].at));
    }
    (*json)["itls"].push_back(std::move(gaps));
    (*json)["errors"].push_back(record.status.ok() ? "" : record.status.ToString());
  }
}

}  // namespace tandem::cli
