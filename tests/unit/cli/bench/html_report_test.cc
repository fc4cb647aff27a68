// The page of a benchmark, and the plots that it is made of.
#include "cli/bench/html_report.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/plot/page.h"
#include "cli/plot/plot.h"
#include "common/base/status.h"
#include "tests/support/process.h"

namespace tandem::cli {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

// Well-formed, without anything from elsewhere and without a script.
void ExpectSelfContained(const std::string& html) {
  const Completed parsed =
      RunCommand({"/usr/bin/python3", "-c",
                  "import sys,xml.dom.minidom as d\n"
                  "page=d.parseString(sys.stdin.buffer.read())\n"
                  "for e in page.getElementsByTagName('*'):\n"
                  "  assert e.tagName not in ('script','link','img','iframe'), e.tagName\n"
                  "  assert not any(a in ('src','href') for a in e.attributes.keys()), e.tagName\n"
                  "print(len(page.getElementsByTagName('svg')))"},
                 60, html);
  EXPECT_EQ(parsed.exit_code, 0) << parsed.err;
  EXPECT_GT(std::atoi(parsed.out.c_str()), 0) << "no plot";
}

TEST(Plot, EscapesWhatItIsGiven) {
  EXPECT_EQ(HtmlText("a<b>&\"c\"\x01"), "a&lt;b&gt;&amp;&quot;c&quot;?");
  HtmlPage page("<t>", "&");
  page.Section("<s>");
  page.Figure("<f>", "<1>");
  const std::vector<PlotLine> lines = {{"<line>", {{0, 0}, {1, 2}}}, {"dot", {{1, 1}}}};
  const AxisText text = [](double) { return "<tick>"; };
  page.Plot("<p>", LinePlot(lines, {.x = text, .y = text}), "<help>");
  page.Table("<t>", {{"<h>"}, {"<c>"}});
  ExpectSelfContained(page.Html());
}

TEST(Plot, NothingIsAPlotToo) {
  HtmlPage page("t", "");
  page.Section("s");
  page.Plot("p", LinePlot({}, {}));
  page.Plot("p", HistogramPlot(MakeHistogram({}, 10), {}));
  page.Plot("p", HeatmapPlot({}, {}));
  page.Plot("p", TimelinePlot({}, {}, {}));
  ExpectSelfContained(page.Html());
}

TEST(Plot, HistogramsCountEveryValue) {
  EXPECT_THAT(MakeHistogram({1, 1, 2, 3}, 2).counts, ElementsAre(2, 2));
  EXPECT_THAT(MakeHistogram({5, 5, 5}, 2).counts, ElementsAre(3, 0));
  // One straggler does not squeeze the others into one bar.
  std::vector<double> values;
  for (int i = 0; i < 200; ++i) values.push_back(i % 10);
  values.push_back(1e6);
  const Histogram histogram = MakeHistogram(values, 10);
  EXPECT_EQ(histogram.counts[0], 20);
  EXPECT_EQ(histogram.counts[9], 21);
}

RequestRecord Answer(double at_ms, absl::Status status = absl::OkStatus()) {
  const auto at = [&](double ms) { return absl::UnixEpoch() + absl::Milliseconds(at_ms + ms); };
  RequestRecord record;
  record.intended = at(0);
  record.sent = at(1);
  record.arrivals = {{at(100), 1}, {at(110), 1}, {at(130), 2}};
  record.ended = at(130);
  record.status = std::move(status);
  record.prompt_tokens = 10;
  return record;
}

TEST(HtmlReport, HoldsEveryFigureOfTheJson) {
  std::vector<RequestRecord> records;
  for (int i = 0; i < 500; ++i) records.push_back(Answer(10 * i));
  records.push_back(Answer(0, ResourceExhausted("no <room>")));
  BenchSetup setup;
  setup.model = "m<1>";
  setup.scenario = "random";
  setup.num_prompts = records.size();
  const BenchMetrics metrics =
      Measure(records, absl::Seconds(6), std::nullopt, std::vector<double>{99});
  const nlohmann::ordered_json json = ReportJson(setup, metrics);
  const std::string html = RenderHtml(setup, metrics, records, json);
  ExpectSelfContained(html);
  size_t figures = 0;
  for (const auto& [name, value] : json.items()) {
    if (value.is_structured()) continue;
    const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
    EXPECT_THAT(html, HasSubstr("<td>" + name + "</td><td>" + HtmlText(text) + "</td>"));
    ++figures;
  }
  EXPECT_GT(figures, 40u);
  EXPECT_THAT(html, HasSubstr("300 of 501 requests"));
  EXPECT_THAT(html, HasSubstr("no &lt;room&gt;"));
}

TEST(HtmlReport, AStoppedRunHasNoRequests) {
  const BenchMetrics metrics =
      Measure({}, absl::Seconds(1), std::nullopt, BenchSetup().percentiles);
  ExpectSelfContained(RenderHtml({}, metrics, {}, ReportJson({}, metrics)));
}

}  // namespace
}  // namespace tandem::cli
