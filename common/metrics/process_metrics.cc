#include "common/metrics/process_metrics.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <sys/resource.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include "prometheus/collectable.h"
#include "prometheus/metric_family.h"

#include "common/base/build_info.h"

namespace tandem {
namespace {

// Seconds since 1970 at which this machine started; the start of a process is told relative to it.
std::optional<double> BootTime() {
  std::ifstream stat("/proc/stat");
  for (std::string word; stat >> word;) {
    double seconds = 0;
    if (word == "btime" && stat >> seconds) return seconds;
  }
  return std::nullopt;
}

// The fields of /proc/self/stat from the third on: the second is a name in brackets, with blanks.
std::vector<std::string> StatFields() {
  std::ifstream file("/proc/self/stat");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const size_t end = text.rfind(')');
  std::istringstream fields(end == std::string::npos ? "" : text.substr(end + 1));
  return {std::istream_iterator<std::string>(fields), std::istream_iterator<std::string>()};
}

double OpenDescriptors() {
  std::error_code error;
  double count = 0;
  for (auto it = std::filesystem::directory_iterator("/proc/self/fd", error);
       !error && it != std::filesystem::directory_iterator(); it.increment(error)) {
    ++count;
  }
  return count > 0 ? count - 1 : 0;  // less the one that reads the directory
}

class ProcessMetrics final : public prometheus::Collectable {
 public:
  explicit ProcessMetrics(const MetricLabels& labels) : boot_(BootTime()) {
    for (const auto& [name, value] : labels) labels_.push_back({name, value});
  }

  std::vector<prometheus::MetricFamily> Collect() const override {
    std::vector<prometheus::MetricFamily> out;
    const auto add = [&](const char* name, const char* help, prometheus::MetricType type,
                         double value) {
      prometheus::ClientMetric metric;
      metric.label = labels_;
      (type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value) = value;
      out.push_back({name, help, type, {std::move(metric)}});
    };
    constexpr auto kGauge = prometheus::MetricType::Gauge;
    // utime 14, stime 15, num_threads 20, starttime 22, vsize 23, rss 24 of proc(5).
    constexpr size_t kFirst = 3, kLast = 24;
    const std::vector<std::string> stat = StatFields();
    if (stat.size() > kLast - kFirst) {
      const auto field = [&](size_t number) {
        return std::strtod(stat[number - kFirst].c_str(), nullptr);
      };
      const auto ticks = static_cast<double>(sysconf(_SC_CLK_TCK));
      add("process_cpu_seconds_total", "Processor time of this process, user and system",
          prometheus::MetricType::Counter, (field(14) + field(15)) / ticks);
      add("process_threads", "Threads of this process", kGauge, field(20));
      if (boot_.has_value()) {
        add("process_start_time_seconds", "When this process started, in seconds since 1970",
            kGauge, *boot_ + field(22) / ticks);
      }
      add("process_virtual_memory_bytes", "Address space of this process", kGauge, field(23));
      add("process_resident_memory_bytes", "Memory of this process, with what it shares", kGauge,
          field(24) * static_cast<double>(sysconf(_SC_PAGESIZE)));
    }
    add("process_open_fds", "Open file descriptors", kGauge, OpenDescriptors());
    rlimit limit{};
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
      add("process_max_fds", "File descriptors that may be open", kGauge,
          static_cast<double>(limit.rlim_cur));
    }
    return out;
  }

 private:
  const std::optional<double> boot_;
  std::vector<prometheus::ClientMetric::Label> labels_;
};

}  // namespace

void AddProcessMetrics(Metrics* metrics, const MetricLabels& labels) {
  metrics->Add(std::make_unique<ProcessMetrics>(labels));
}

void AddBuildInfo(Metrics* metrics) {
  const BuildInfo build = GetBuildInfo();
  metrics
      ->Gauge("tandem_build_info", "1; the labels say what this process was built from",
              {{"version", build.version}, {"commit", build.commit}, {"build_type", build.type}})
      .Set(1);
}

}  // namespace tandem
