#include "cli/bench/html_report.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "fmt/format.h"

#include "cli/plot/page.h"
#include "cli/plot/plot.h"
#include "cli/units.h"

namespace tandem::cli {
namespace {

using nlohmann::ordered_json;

constexpr int kBars = 40;
constexpr size_t kTimelineRows = 300;
constexpr int kMoments = 120;  // of a line over the run

double ToMs(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }
std::string MsText(double ms) {
  return ms < 1000 ? fmt::format("{:.3g} ms", ms) : fmt::format("{:.3g} s", ms / 1000);
}
std::string PercentText(double p) { return fmt::format("p{:.3g}", p); }
std::string SecondsText(double s) { return fmt::format("{:.3g} s", s); }
std::string NumberText(double number) {
  return number < 1000 ? fmt::format("{:.3g}", number)
                       : CountText(static_cast<uint64_t>(std::llround(number)));
}

// Milliseconds of the requests that ended well.
struct Latencies {
  std::vector<double> ttft, itl, tpot, e2el;

  explicit Latencies(std::span<const RequestRecord> records) {
    for (const RequestRecord& record : records) {
      if (!record.status.ok()) continue;
      e2el.push_back(ToMs(record.ended - record.intended));
      const std::vector<TokenArrival>& arrivals = record.arrivals;
      if (arrivals.empty()) continue;
      ttft.push_back(ToMs(arrivals.front().at - record.intended));
      for (size_t i = 1; i < arrivals.size(); ++i) {
        itl.push_back(ToMs(arrivals[i].at - arrivals[i - 1].at));
      }
      const int behind = record.output_tokens() - arrivals.front().tokens;
      if (behind > 0) tpot.push_back(ToMs(arrivals.back().at - arrivals.front().at) / behind);
    }
  }
};

PlotLine PercentileCurve(std::string name, std::vector<double> values) {
  std::sort(values.begin(), values.end());
  PlotLine line{std::move(name), {}};
  for (int p = 0; p <= 200 && !values.empty(); ++p) {
    line.points.push_back({p / 2.0, Percentile(values, p / 2.0)});
  }
  return line;
}

void AddCurves(const Latencies& latencies, HtmlPage* page) {
  const PlotAxes axes{.x = PercentText, .y = MsText};
  const auto add = [&](const char* title, const std::vector<PlotLine>& lines, const char* help) {
    page->Plot(title, LinePlot(lines, axes), help);
  };
  page->Section("How long it took");
  add("Time to first token, and whole request",
      {PercentileCurve("TTFT", latencies.ttft), PercentileCurve("E2EL", latencies.e2el)},
      "From the time when a request was to be sent: at p90, nine of ten took no longer.");
  add("Gap between messages, and time per token",
      {PercentileCurve("ITL", latencies.itl), PercentileCurve("TPOT", latencies.tpot)},
      "TPOT is each request's mean behind its first token.");
  const PlotAxes counts{.x = MsText, .y = NumberText};
  page->Plot("Time to first token", HistogramPlot(MakeHistogram(latencies.ttft, kBars), counts),
             "Requests; the last bar holds the slowest hundredth.");
  page->Plot("Gap between messages", HistogramPlot(MakeHistogram(latencies.itl, kBars), counts),
             "Gaps; the last bar holds the longest hundredth.");
}

// Over the seconds of the run.
class Course {
 public:
  explicit Course(std::span<const RequestRecord> records) : records_(records) {
    for (const RequestRecord& record : records) {
      start_ = std::min(start_, record.intended);
      end_ = std::max(end_, record.ended);
    }
  }
  void AddTo(HtmlPage* page) const {
    if (records_.empty()) return;
    const PlotAxes axes{.x = SecondsText, .y = NumberText, .x_from = 0, .x_to = Seconds(end_)};
    page->Section("What happened when");
    page->Plot("Tokens per second", LinePlot(std::vector<PlotLine>{Tokens()}, axes));
    page->Plot("Requests at once", LinePlot(std::vector<PlotLine>{AtOnce()}, axes));
    page->Plot("Requests", Timeline(axes), TimelineHelp(), /*wide=*/true);
  }

 private:
  double Seconds(absl::Time at) const { return absl::ToDoubleSeconds(at - start_); }
  double Moment() const { return std::max(Seconds(end_) / kMoments, 1e-3); }

  PlotLine Tokens() const {
    std::vector<double> counts(kMoments + 1);
    for (const RequestRecord& record : records_) {
      for (const TokenArrival& arrival : record.arrivals) {
        const auto moment = static_cast<size_t>(Seconds(arrival.at) / Moment());
        counts[std::min<size_t>(moment, kMoments)] += arrival.tokens;
      }
    }
    PlotLine line;
    for (size_t i = 0; i < counts.size(); ++i) {
      line.points.push_back({(static_cast<double>(i) + 0.5) * Moment(), counts[i] / Moment()});
    }
    return line;
  }
  PlotLine AtOnce() const {
    PlotLine line;
    for (int i = 0; i <= kMoments; ++i) {
      const double at = i * Moment();
      const auto runs = [&](const RequestRecord& record) {
        return Seconds(record.sent) <= at && at < Seconds(record.ended);
      };
      line.points.push_back(
          {at, static_cast<double>(std::count_if(records_.begin(), records_.end(), runs))});
    }
    return line;
  }

  std::string Timeline(const PlotAxes& axes) const {
    std::vector<const RequestRecord*> order;
    for (const RequestRecord& record : records_) order.push_back(&record);
    std::stable_sort(order.begin(), order.end(),
                     [](const auto* a, const auto* b) { return a->intended < b->intended; });
    const size_t shown = std::min(order.size(), kTimelineRows);
    std::vector<TimelineRow> rows;
    for (size_t i = 0; i < shown; ++i) rows.push_back(RowOf(*order[i * order.size() / shown]));
    const std::vector<std::string> parts = {"not sent yet", "to the first token", "answer"};
    return TimelinePlot(rows, parts, axes);
  }
  TimelineRow RowOf(const RequestRecord& record) const {
    const absl::Time first = record.arrivals.empty() ? record.ended : record.arrivals.front().at;
    TimelineRow row;
    row.bounds = {Seconds(record.intended), Seconds(record.sent), Seconds(first),
                  Seconds(record.ended)};
    row.failed = !record.status.ok();
    row.title = fmt::format("{} prompt tokens, {} generated: {}", record.prompt_tokens,
                            record.output_tokens(), absl::StatusCodeToString(record.status.code()));
    return row;
  }
  std::string TimelineHelp() const {
    if (records_.size() <= kTimelineRows) return "A row for each request.";
    return fmt::format("{} of {} requests, evenly chosen.", kTimelineRows, records_.size());
  }

  const std::span<const RequestRecord> records_;
  absl::Time start_ = absl::InfiniteFuture();
  absl::Time end_ = absl::InfinitePast();
};

void AddFigures(const BenchMetrics& metrics, HtmlPage* page) {
  const auto rate = [&](double amount) { return NumberText(metrics.PerSecond(amount)); };
  page->Section("Result");
  page->Figure("Requests answered", CountText(metrics.completed));
  page->Figure("Failed", CountText(metrics.failed));
  page->Figure("Requests per second", rate(static_cast<double>(metrics.completed)));
  page->Figure("Tokens per second", rate(static_cast<double>(metrics.output_tokens)));
  page->Figure("Median time to first token", MsText(metrics.ttft.median));
  page->Figure("Median gap between messages", MsText(metrics.itl.median));
  if (metrics.good) {
    page->Figure("Good requests per second", rate(static_cast<double>(*metrics.good)));
  }
}

// Every figure, and beside it that of the other run.
std::vector<std::vector<std::string>> FigureTable(const ordered_json& json,
                                                  const std::string& other_name,
                                                  const ordered_json& other) {
  std::vector<std::vector<std::string>> rows(1);
  rows[0] = {"figure", other.is_null() ? "value" : "this run"};
  if (!other.is_null()) rows[0].push_back(other_name);
  const auto text = [](const ordered_json& value) {
    return value.is_string() ? value.get<std::string>() : value.dump();
  };
  for (const auto& [name, value] : json.items()) {
    if (value.is_structured()) continue;
    rows.push_back({name, text(value)});
    if (!other.is_null()) rows.back().push_back(other.contains(name) ? text(other[name]) : "");
  }
  return rows;
}

}  // namespace

std::string RenderHtml(const BenchSetup& setup, const BenchMetrics& metrics,
                       std::span<const RequestRecord> records, const ordered_json& json,
                       const std::string& other_name, const ordered_json& other) {
  const std::string rate = setup.request_rate > 0 ? fmt::format("{} req/s", setup.request_rate)
                           : setup.max_concurrency > 0
                               ? fmt::format("{} at once", setup.max_concurrency)
                               : "at once";
  HtmlPage page(fmt::format("Benchmark of {}", setup.model),
                fmt::format("{}, {}: {} conversations, {}", setup.date, setup.scenario,
                            setup.num_prompts, rate));
  AddFigures(metrics, &page);
  AddCurves(Latencies(records), &page);
  Course(records).AddTo(&page);
  if (!metrics.failures.empty()) {
    std::vector<std::vector<std::string>> rows = {{"status", "requests", "for example"}};
    for (const auto& [code, failure] : metrics.failures) {
      rows.push_back({code, std::to_string(failure.count), failure.example});
    }
    page.Section("Failed requests");
    page.Table("By status", rows);
  }
  page.Section("All figures");
  page.Table("As in the JSON object", FigureTable(json, other_name, other));
  return page.Html();
}

}  // namespace tandem::cli
