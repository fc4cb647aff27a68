#include "common/metrics/open_metrics.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "fmt/format.h"

#include "common/base/check.h"

namespace tandem {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

constexpr std::string_view kTotal = "_total";

std::string Escaped(const std::string& text) {
  return absl::StrReplaceAll(text, {{"\\", "\\\\"}, {"\n", "\\n"}, {"\"", "\\\""}});
}

std::string Number(double value) {
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  return std::isnan(value) ? "NaN" : fmt::format("{}", value);
}

// As the specification wants bounds: always a float.
std::string Bound(double value) {
  std::string text = Number(value);
  if (std::isfinite(value) && text.find_first_of(".e") == text.npos) text += ".0";
  return text;
}

std::string Labels(const ClientMetric& metric, std::string_view more = "") {
  std::string out;
  for (const ClientMetric::Label& label : metric.label) {
    out += fmt::format("{}{}=\"{}\"", out.empty() ? "" : ",", label.name, Escaped(label.value));
  }
  if (!more.empty()) out += fmt::format("{}{}", out.empty() ? "" : ",", more);
  return out.empty() ? "" : "{" + out + "}";
}

std::string ExemplarText(const std::optional<Exemplar>& exemplar) {
  if (!exemplar.has_value()) return "";
  return fmt::format(" # {{trace_id=\"{}\"}} {} {:.3f}", exemplar->trace.ToHex(),
                     Number(exemplar->value),
                     absl::ToDoubleSeconds(exemplar->time - absl::UnixEpoch()));
}

class Writer {
 public:
  explicit Writer(const ExemplarsOf& exemplars_of) : exemplars_of_(exemplars_of) {}

  void Add(const MetricFamily& family) {
    std::string_view name = family.name;
    switch (family.type) {
      case MetricType::Counter:
        TANDEM_CHECK(name.ends_with(kTotal), "counter {} does not end with {}", name, kTotal);
        name.remove_suffix(kTotal.size());
        Describe(name, "counter", family.help);
        for (const ClientMetric& metric : family.metric) {
          Sample(name, kTotal, Labels(metric), metric.counter.value);
        }
        return;
      case MetricType::Gauge:
        Describe(name, "gauge", family.help);
        for (const ClientMetric& metric : family.metric) {
          Sample(name, "", Labels(metric), metric.gauge.value);
        }
        return;
      case MetricType::Histogram:
        Describe(name, "histogram", family.help);
        for (const ClientMetric& metric : family.metric) AddHistogram(family.name, metric);
        return;
      default:
        TANDEM_CHECK(false, "{} is neither counter nor gauge nor histogram", name);
    }
  }

  std::string Finish() {
    text_ += "# EOF\n";
    return std::move(text_);
  }

 private:
  void Describe(std::string_view name, std::string_view type, const std::string& help) {
    Append("# TYPE {} {}\n# HELP {} {}\n", name, type, name, Escaped(help));
  }
  void Sample(std::string_view name, std::string_view suffix, const std::string& labels,
              double value, const std::string& exemplar = "") {
    Append("{}{}{} {}{}\n", name, suffix, labels, Number(value), exemplar);
  }
  void AddHistogram(const std::string& name, const ClientMetric& metric) {
    const std::vector<std::optional<Exemplar>> exemplars = exemplars_of_(name, metric);
    for (size_t i = 0; i < metric.histogram.bucket.size(); ++i) {
      const ClientMetric::Bucket& bucket = metric.histogram.bucket[i];
      Sample(name, "_bucket", Labels(metric, fmt::format("le=\"{}\"", Bound(bucket.upper_bound))),
             static_cast<double>(bucket.cumulative_count),
             i < exemplars.size() ? ExemplarText(exemplars[i]) : "");
    }
    Sample(name, "_count", Labels(metric), static_cast<double>(metric.histogram.sample_count));
    Sample(name, "_sum", Labels(metric), metric.histogram.sample_sum);
  }
  template <typename... Args>
  void Append(fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(text_), format, std::forward<Args>(args)...);
  }

  const ExemplarsOf& exemplars_of_;
  std::string text_;
};

// What an element of an Accept header says: "TYPE; q=0.5; version=1.0.0".
struct MediaRange {
  std::string type;
  std::string version;
  double quality = 1;
};

MediaRange ParseMediaRange(const std::string& text) {
  MediaRange out;
  for (std::string& part : std::vector<std::string>(absl::StrSplit(text, ';'))) {
    absl::StripAsciiWhitespace(&part);
    if (out.type.empty()) {
      out.type = absl::AsciiStrToLower(part);
    } else if (part.starts_with("version=")) {
      out.version = part.substr(part.find('=') + 1);
    } else if (part.starts_with("q=") && !absl::SimpleAtod(part.substr(2), &out.quality)) {
      out.quality = 0;
    }
  }
  return out;
}

}  // namespace

bool WantsOpenMetrics(const std::string& accept) {
  double open = 0, text = 0;
  for (const std::string& element : std::vector<std::string>(absl::StrSplit(accept, ','))) {
    const MediaRange range = ParseMediaRange(element);
    if (range.type == "application/openmetrics-text" &&
        (range.version.empty() || range.version == "1.0.0")) {
      open = std::max(open, range.quality);
    } else if (range.type == "text/plain") {
      text = std::max(text, range.quality);
    }
  }
  return open > 0 && open >= text;
}

std::string OpenMetricsText(const std::vector<MetricFamily>& families,
                            const ExemplarsOf& exemplars_of) {
  Writer writer(exemplars_of);
  for (const MetricFamily& family : families) writer.Add(family);
  return writer.Finish();
}

}  // namespace tandem
