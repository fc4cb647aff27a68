// Pages of /metrics, and what the dashboards' queries make of them.
#include "cli/report/promql.h"

#include <atomic>
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/report/dashboard.h"
#include "cli/report/dashboard_report.h"
#include "cli/report/live_source.h"
#include "cli/report/prometheus_source.h"
#include "httplib.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using testing::DoubleEq;
using testing::ElementsAre;
using testing::IsEmpty;

// Three moments, 10 s apart.
Samples SomeSamples() {
  Samples samples;
  for (int i = 0; i < 3; ++i) {
    samples.Begin(1000 + 10 * i);
    samples.AddPage(
        "# HELP c_total Counts.\n"
        "# TYPE c_total counter\n"
        "c_total{worker=\"a\"} " +
        std::to_string(100 * i) +
        "\n"
        "c_total{worker=\"b\"} " +
        std::to_string(10 * i) +
        "\n"
        "g{worker=\"a\",name=\"with \\\"quotes\\\", and\\\\\"} 3\n"
        "g{worker=\"b\"} 5\n"
        "h_seconds_bucket{le=\"0.1\"} " +
        std::to_string(10 * i) +
        "\n"
        "h_seconds_bucket{le=\"0.2\"} " +
        std::to_string(30 * i) +
        "\n"
        "h_seconds_bucket{le=\"+Inf\"} " +
        std::to_string(40 * i) +
        "\n"
        "plain 7\n"
        "broken{\n"
        "nothing\n");
  }
  return samples;
}

// Of the last moment, by labels; NaN is left out.
std::vector<double> Last(const std::string& expression) {
  const Samples samples = SomeSamples();
  const auto found = EvaluatePromQl(expression, samples);
  EXPECT_OK(found);
  std::vector<double> out;
  for (const SampledSeries& series : *found) {
    EXPECT_EQ(series.values.size(), 3u);
    if (!std::isnan(series.values.back())) out.push_back(series.values.back());
  }
  return out;
}

TEST(PromQl, SelectsByLabels) {
  EXPECT_THAT(Last("plain"), ElementsAre(7));
  EXPECT_THAT(Last("g{worker=\"b\"}"), ElementsAre(5));
  EXPECT_THAT(Last("g{worker!=\"b\"}"), ElementsAre(3));
  EXPECT_THAT(Last("g{worker=~\"a|b\",job=~\"$job\"}"), ElementsAre(3, 5));
  EXPECT_THAT(Last("g{worker!~\"a.*\"}"), ElementsAre(5));
  EXPECT_THAT(Last("unknown"), IsEmpty());
  const Samples samples = SomeSamples();
  EXPECT_EQ(samples.Of("g")[0].labels.at("name"), "with \"quotes\", and\\");
}

TEST(PromQl, AddsUpAndDivides) {
  EXPECT_THAT(Last("sum (g)"), ElementsAre(8));
  EXPECT_THAT(Last("max (g)"), ElementsAre(5));
  EXPECT_THAT(Last("avg (g) * 2 - 1"), ElementsAre(7));
  EXPECT_THAT(Last("count by (worker) (g)"), ElementsAre(1, 1));
  EXPECT_THAT(Last("sum by (worker) (c_total) / sum by (worker) (g)"),
              ElementsAre(DoubleEq(200 / 3.0), 4));
  EXPECT_THAT(Last("clamp_min(plain - 10, 0) + 1"), ElementsAre(1));
  EXPECT_THAT(Last("time() - plain"), ElementsAre(1013));
}

TEST(PromQl, KnowsCountersAndHistograms) {
  EXPECT_THAT(Last("sum (rate(c_total[30s]))"), ElementsAre(11));
  EXPECT_THAT(Last("sum by (worker) (increase(c_total[$__rate_interval]))"), ElementsAre(200, 20));
  // 20 of 80 are up to 0.1, 60 up to 0.2.
  const std::string rate = "sum by (le) (rate(h_seconds_bucket[30s]))";
  EXPECT_THAT(Last("histogram_quantile(0.5, " + rate + ")"), ElementsAre(DoubleEq(0.15)));
  EXPECT_THAT(Last("histogram_quantile(0.125, " + rate + ")"), ElementsAre(DoubleEq(0.05)));
  EXPECT_THAT(Last("histogram_quantile(0.99, " + rate + ")"), ElementsAre(DoubleEq(0.2)));
}

TEST(PromQl, ACounterThatBeganAnewLosesNothing) {
  Samples samples;
  for (const double value : {100.0, 150.0, 20.0}) {
    samples.Begin(samples.times().size() * 10.0);
    samples.AddPage("c_total " + std::to_string(value) + "\n");
  }
  const auto found = EvaluatePromQl("increase(c_total[1m])", samples);
  ASSERT_OK(found);
  EXPECT_DOUBLE_EQ(found->front().values[1], 50);
  EXPECT_DOUBLE_EQ(found->front().values[2], 20);
}

TEST(PromQl, SaysWhereItStopsToUnderstand) {
  const Samples samples = SomeSamples();
  for (const char* wrong :
       {"", "sum (", "sum of (g)", "rate(c_total", "g{worker}", "deriv(g)", "plain plain", "1 +"}) {
    const auto found = EvaluatePromQl(wrong, samples);
    EXPECT_TRUE(absl::IsInvalidArgument(found.status())) << wrong;
  }
}

// Every query of every panel, so that none that is added to the dashboard is left out in silence.
TEST(PromQl, UnderstandsTheWholeDashboard) {
  const Samples samples = SomeSamples();
  size_t queries = 0;
  for (const DashboardRow& row : LatencyDashboard().rows) {
    for (const DashboardPanel& panel : row.panels) {
      for (const PanelQuery& query : panel.queries) {
        const absl::Status status = EvaluatePromQl(query.expression, samples).status();
        EXPECT_TRUE(status.ok()) << status;
        ++queries;
      }
    }
  }
  EXPECT_GT(queries, 50u);
}

// Gives the same for every query: two lines of three points.
class FixedSource final : public SeriesSource {
 public:
  double start() const override { return 0; }
  double end() const override { return 20; }
  double step() const override { return 10; }
  absl::StatusOr<std::vector<Series>> Query(const std::string& expression) override {
    if (expression == "nothing") return std::vector<Series>();
    return std::vector<Series>{
        {{{"worker", "a"}, {"le", "0.1"}}, {{0, 0.001}, {10, 0.005}, {20, 0.002}}},
        {{{"worker", "b<"}, {"le", "+Inf"}}, {{0, 2}, {10, 1}, {20, 3}}}};
  }
};

TEST(DashboardReport, ShowsNowLowestAndHighest) {
  using Kind = DashboardPanel::Kind;
  const Dashboard board = {
      "Latency",
      {{"Row",
        {{"Time", Kind::kLines, "s", "what it is", {{"x", "p50 {{ worker }}"}}},
         {"Nothing", Kind::kLines, "s", "", {{"nothing", "__auto"}}},
         {"Heat", Kind::kHeatmap, "s", "", {{"x", "{{le}}"}}},
         {"Figure", Kind::kFigure, "percentunit", "", {{"x", "__auto"}}}}}}};
  FixedSource source;
  const auto report = MakeDashboardReport(board, &source);
  ASSERT_OK(report);
  const std::string head = report->text.substr(report->text.find('\n') + 1);
  EXPECT_EQ(head,
            "                                                  now      lowest     highest\n"
            "\n"
            "Row\n"
            "  Time\n"
            "    p50 a                                        2 ms        1 ms        5 ms\n"
            "    p50 b<                                        3 s         1 s         3 s\n"
            "  Nothing: no data\n"
            "    le 0.1, worker a                            0.2 %       0.1 %       0.5 %\n"
            "    le +Inf, worker b<                          300 %       100 %       300 %\n");
  EXPECT_THAT(report->html, testing::HasSubstr("p50 b&lt; 3 s"));
  EXPECT_THAT(report->html, testing::Not(testing::HasSubstr("<script")));
}

// Where series come from.
class HttpServer {
 public:
  explicit HttpServer(const std::function<void(httplib::Server*)>& prepare) {
    prepare(&server_);
    port_ = server_.bind_to_any_port("127.0.0.1");
    thread_ = std::thread([this] { server_.listen_after_bind(); });
    while (!server_.is_running()) std::this_thread::yield();
  }
  ~HttpServer() {
    server_.stop();
    thread_.join();
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }

 private:
  httplib::Server server_;
  int port_ = 0;
  std::thread thread_;
};

TEST(PrometheusSource, AsksForASpanAndFillsVariablesIn) {
  httplib::Params asked;
  HttpServer server([&](httplib::Server* http) {
    http->Post("/api/v1/query_range", [&](const httplib::Request& request, auto& response) {
      asked = request.params;
      response.set_content(
          R"({"status": "success", "data": {"result": [{"metric": {"worker": "a"},
              "values": [[10, "1.5"], [20, "NaN"], [30, "2"]]}, {"metric": {}, "values": [[10, "NaN"]]}]}})",
          "application/json");
    });
  });
  PrometheusSource source(*ParseHttpUrl("--prometheus", "http://" + server.address()), 1000, 600);
  const auto series = source.Query("rate(x{job=~\"$job\"}[$__rate_interval])");
  ASSERT_OK(series);
  ASSERT_EQ(series->size(), 1u);
  EXPECT_EQ(series->front().labels.at("worker"), "a");
  ASSERT_EQ(series->front().points.size(), 2u);
  EXPECT_EQ(series->front().points[1].y, 2);
  EXPECT_EQ(asked.find("query")->second, "rate(x{job=~\".*\"}[30s])");
  EXPECT_EQ(asked.find("start")->second, "400.000");
  EXPECT_EQ(asked.find("step")->second, "5.000");
}

TEST(PrometheusSource, SaysThatItIsNone) {
  HttpServer server([](httplib::Server* http) {
    http->Post("/api/v1/query_range",
               [](const auto&, auto& response) { response.set_content("{}", "text/plain"); });
  });
  const std::string url = "http://" + server.address();
  PrometheusSource source(*ParseHttpUrl("--prometheus", url), 1000, 600);
  EXPECT_THAT(source.Query("x").status().ToString(), testing::HasSubstr("a Prometheus?"));
  PrometheusSource elsewhere(*ParseHttpUrl("--prometheus", url + "/other"), 1000, 600);
  EXPECT_THAT(elsewhere.Query("x").status().ToString(), testing::HasSubstr("HTTP 404"));
}

TEST(LiveSource, ReadsPagesForAWhile) {
  std::atomic<int> pages = 0;
  HttpServer server([&](httplib::Server* http) {
    http->Get("/metrics", [&](const auto&, auto& response) {
      response.set_content("c_total " + std::to_string(10 * pages++) + "\n", "text/plain");
    });
  });
  const auto source = LiveSource::Collect({server.address()}, absl::Milliseconds(100));
  ASSERT_OK(source);
  EXPECT_GT(pages, 10);
  const auto series = (*source)->Query("increase(c_total[1m])");
  ASSERT_OK(series);
  EXPECT_EQ(series->front().points.back().y, 10 * kRateMoments);
  EXPECT_FALSE(LiveSource::Collect({"127.0.0.1:1"}, absl::Milliseconds(1)).ok());
}

TEST(DashboardReport, WritesValuesAsPeopleReadThem) {
  EXPECT_EQ(ValueText(0.00123, "s"), "1.23 ms");
  EXPECT_EQ(ValueText(0.0000456, "s"), "45.6 us");
  EXPECT_EQ(ValueText(90, "s"), "90 s");
  EXPECT_EQ(ValueText(86400, "s"), "86400 s");
  EXPECT_EQ(ValueText(0.456, "percentunit"), "45.6 %");
  EXPECT_EQ(ValueText(1.5e9, "Bps"), "1.5 GB/s");
  EXPECT_EQ(ValueText(12, "bytes"), "12 B");
  EXPECT_EQ(ValueText(12.5, "reqps"), "12.5/s");
  EXPECT_EQ(ValueText(1234, "short"), "1.23 k");
  EXPECT_EQ(ValueText(NAN, "s"), "-");
}

}  // namespace
}  // namespace tandem::cli
