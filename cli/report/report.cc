// `tandem report`: what the latency dashboard shows, without Grafana.
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"

#include "cli/command.h"
#include "cli/http_url.h"
#include "cli/report/dashboard.h"
#include "cli/report/dashboard_report.h"
#include "cli/report/live_source.h"
#include "cli/report/prometheus_source.h"
#include "common/base/file.h"
#include "common/base/host_port.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

struct ReportFlags {
  std::string prometheus;
  double minutes = 60;
  std::vector<std::string> metrics;
  std::string metrics_sd_file;
  double seconds = 10;
  std::string html;

  void AddTo(FlagSet* flags) {
    flags->Add("--prometheus", &prometheus, "the Prometheus that scrapes the cluster",
               "http://HOST:PORT");
    flags->Add("--minutes", &minutes, "with --prometheus: back from now");
    flags->AddList("--metrics", &metrics,
                   "without a Prometheus: the processes' own /metrics, that of the router first",
                   "HOST:PORT");
    flags->Add("--metrics-sd-file", &metrics_sd_file,
               "the same, from the file that `tandem up --metrics-sd-file` keeps", "path");
    flags->Add("--seconds", &seconds, "for so long those are read", "s");
    flags->Add("--html", &html, "write a page with plots as well; it needs nothing beside it",
               "path");
    flags->Example("tandem report --prometheus http://localhost:9090 --html report.html");
    flags->Example("tandem report --metrics 127.0.0.1:9090 127.0.0.1:9091 127.0.0.1:9092");
  }
  absl::Status Check() const {
    if (!(minutes > 0 && minutes <= 60 * 24 * 31)) {
      return InvalidArgument("--minutes must be above 0 and at most 44640 (31 days), got {}",
                             minutes);
    }
    if (!(seconds > 0 && seconds <= 3600)) {
      return InvalidArgument("--seconds must be above 0 and at most 3600, got {}", seconds);
    }
    const int given = (prometheus.empty() ? 0 : 1) + (metrics.empty() ? 0 : 1) +
                      (metrics_sd_file.empty() ? 0 : 1);
    if (given == 1) return absl::OkStatus();
    return InvalidArgument(
        "give one of --prometheus, --metrics and --metrics-sd-file; `tandem up --metrics-port "
        "9090` serves the router's metrics there and the workers' behind it");
  }
};

// As file_sd_configs has it: [{"targets": ["HOST:PORT", ...]}].
absl::StatusOr<std::vector<std::string>> ReadTargets(const std::string& path) {
  TANDEM_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const nlohmann::json groups = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  std::vector<std::string> out;
  if (groups.is_array()) {
    for (const auto& group : groups) {
      if (!group.is_object() || !group.contains("targets")) continue;
      for (const auto& target : group["targets"]) {
        if (target.is_string()) out.push_back(target.get<std::string>());
      }
    }
  }
  if (out.empty()) return InvalidArgument("--metrics-sd-file {}: it names no targets", path);
  return out;
}

absl::StatusOr<std::unique_ptr<SeriesSource>> OpenSource(const ReportFlags& flags) {
  if (!flags.prometheus.empty()) {
    TANDEM_ASSIGN_OR_RETURN(HttpUrl url, ParseHttpUrl("--prometheus", flags.prometheus));
    const double now = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());
    return std::make_unique<PrometheusSource>(std::move(url), now, flags.minutes * 60);
  }
  std::vector<std::string> addresses = flags.metrics;
  if (!flags.metrics_sd_file.empty()) {
    TANDEM_ASSIGN_OR_RETURN(addresses, ReadTargets(flags.metrics_sd_file));
  }
  for (const std::string& address : addresses) {
    if (const absl::Status status = ParseHostPort(address).status(); !status.ok()) {
      return InvalidArgument("--metrics: {}", MessageOf(status));
    }
  }
  return LiveSource::Collect(addresses, absl::Seconds(flags.seconds));
}

absl::Status Report(const ReportFlags& flags) {
  TANDEM_ASSIGN_OR_RETURN(const std::unique_ptr<SeriesSource> source, OpenSource(flags));
  TANDEM_ASSIGN_OR_RETURN(const DashboardReport report,
                          MakeDashboardReport(LatencyDashboard(), source.get()));
  fmt::print("{}", report.text);
  if (flags.html.empty()) return absl::OkStatus();
  std::ofstream out(flags.html);
  out << report.html;
  out.close();
  if (!out) return Unavailable("--html: cannot write {}", flags.html);
  return absl::OkStatus();
}

}  // namespace

int RunReport(const Arguments& arguments) {
  FlagSet parser("tandem report",
                 "Shows what the latency dashboard shows, as text and as a page with plots.");
  ReportFlags flags;
  flags.AddTo(&parser);
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;
  if (const absl::Status status = flags.Check(); !status.ok()) {
    Complain("tandem report: " + MessageOf(status));
    return kExitUsage;
  }
  const absl::Status status = Report(flags);
  return status.ok() ? kExitOk : Fail("report", status);
}

}  // namespace tandem::cli
