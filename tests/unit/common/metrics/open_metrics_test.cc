#include "common/metrics/open_metrics.h"

#include <limits>
#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/metrics/metrics.h"
#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

using testing::AllOf;
using testing::EndsWith;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

constexpr char kGiven[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

TEST(WantsOpenMetricsTest, IfItIsLikedAsWellAsTheOtherText) {
  // Prometheus 2.42, 2.53 and 3.
  EXPECT_TRUE(
      WantsOpenMetrics("application/openmetrics-text;version=1.0.0,application/"
                       "openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;"
                       "q=0.5,*/*;q=0.1"));
  EXPECT_TRUE(
      WantsOpenMetrics("application/openmetrics-text;version=1.0.0;q=0.5,application/"
                       "openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;"
                       "q=0.3,*/*;q=0.2"));
  EXPECT_TRUE(
      WantsOpenMetrics("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;"
                       "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3"));
  EXPECT_TRUE(WantsOpenMetrics("Application/OpenMetrics-Text"));

  EXPECT_FALSE(WantsOpenMetrics(""));
  EXPECT_FALSE(WantsOpenMetrics("*/*"));
  EXPECT_FALSE(WantsOpenMetrics("text/html,application/xml;q=0.9,*/*;q=0.8"));
  EXPECT_FALSE(WantsOpenMetrics("text/plain, application/openmetrics-text; q=0.5"));
  EXPECT_FALSE(WantsOpenMetrics("application/openmetrics-text;q=0"));
  EXPECT_FALSE(WantsOpenMetrics("application/openmetrics-text;q=much"));
  EXPECT_FALSE(WantsOpenMetrics("application/openmetrics-text;version=0.0.1"));
}

TEST(OpenMetricsTest, WritesWhatTheSpecificationSays) {
  Metrics metrics;
  metrics.SetLabels({{"role", "router"}});
  metrics.Counter("tandem_x_total", "Things, \"x\"\nor \\.", {{"kind", "a\"b\\c\nd"}}).Increment(3);
  metrics.Gauge("tandem_level", "Level.").Set(2.5);
  metrics.Gauge("tandem_top", "Top.").Set(std::numeric_limits<double>::infinity());
  auto& histogram = metrics.Histogram("tandem_gap_seconds", "Gaps.", {0.00005, 0.25, 1, 65536});
  histogram.Observe(0.25);
  histogram.Observe(1e9);
  EXPECT_EQ(metrics.RenderOpenMetrics(),
            "# TYPE tandem_x counter\n"
            "# HELP tandem_x Things, \\\"x\\\"\\nor \\\\.\n"
            "tandem_x_total{role=\"router\",kind=\"a\\\"b\\\\c\\nd\"} 3\n"
            "# TYPE tandem_level gauge\n"
            "# HELP tandem_level Level.\n"
            "tandem_level{role=\"router\"} 2.5\n"
            "# TYPE tandem_top gauge\n"
            "# HELP tandem_top Top.\n"
            "tandem_top{role=\"router\"} +Inf\n"
            "# TYPE tandem_gap_seconds histogram\n"
            "# HELP tandem_gap_seconds Gaps.\n"
            "tandem_gap_seconds_bucket{role=\"router\",le=\"5e-05\"} 0\n"
            "tandem_gap_seconds_bucket{role=\"router\",le=\"0.25\"} 1\n"
            "tandem_gap_seconds_bucket{role=\"router\",le=\"1.0\"} 1\n"
            "tandem_gap_seconds_bucket{role=\"router\",le=\"65536.0\"} 1\n"
            "tandem_gap_seconds_bucket{role=\"router\",le=\"+Inf\"} 2\n"
            "tandem_gap_seconds_count{role=\"router\"} 2\n"
            "tandem_gap_seconds_sum{role=\"router\"} 1000000000.25\n"
            "# EOF\n");
}

TEST(OpenMetricsTest, ABucketNamesItsLastRequestWhoseTraceIsKept) {
  const TraceContext first = ParseTraceparent(kGiven);
  TraceContext second = first, unsampled = first;
  second.trace.low = 2;
  unsampled.sampled = false;
  const absl::Time t = absl::FromUnixMillis(1600000000250);
  Metrics metrics;
  metrics.SetLabels({{"role", "router"}});
  auto& hit = metrics.TracedHistogram("tandem_t_seconds", "T.", {1, 2}, {{"cache", "hit"}});
  auto& miss = metrics.TracedHistogram("tandem_t_seconds", "T.", {1, 2}, {{"cache", "miss"}});
  hit.Observe(1, first, t);
  hit.Observe(0.5, unsampled, t);
  hit.Observe(0.5, {}, t);
  miss.Observe(1.5, first, t);
  miss.Observe(2, second, t);
  miss.Observe(7, first, t);
  const std::string page = metrics.RenderOpenMetrics();
  const auto bucket = [](const char* cache, const char* le) {
    return fmt::format("tandem_t_seconds_bucket{{role=\"router\",cache=\"{}\",le=\"{}\"}} ", cache,
                       le);
  };
  const std::string of_first = " # {trace_id=\"0af7651916cd43dd8448eb211c80319c\"} ";
  EXPECT_THAT(page, HasSubstr(bucket("hit", "1.0") + "3" + of_first + "1 1600000000.250\n"));
  EXPECT_THAT(page, HasSubstr(bucket("hit", "2.0") + "3\n"));
  EXPECT_THAT(page, HasSubstr(bucket("miss", "1.0") + "0\n"));
  EXPECT_THAT(page, HasSubstr(bucket("miss", "2.0") +
                              "2 # {trace_id=\"0af7651916cd43dd0000000000000002\"} 2 "
                              "1600000000.250\n"));
  EXPECT_THAT(page, HasSubstr(bucket("miss", "+Inf") + "3" + of_first + "7 1600000000.250\n"));
  EXPECT_THAT(metrics.Render(), Not(HasSubstr("trace_id")));
}

// The strictest reader that Debian has: that of Prometheus' own client for Python.
TEST(OpenMetricsTest, AStrictReaderTakesIt) {
  Metrics metrics;
  ASSERT_TRUE(metrics.Serve("127.0.0.1:0").ok());
  metrics.Counter("tandem_x_total", "X.", {{"kind", "a\"b\\c\nd"}}).Increment(3);
  metrics.TracedHistogram("tandem_t_seconds", "T.", TokenGapBuckets())
      .Observe(0.003, ParseTraceparent(kGiven), absl::Now());
  const Completed read = RunCommand(
      {"/usr/bin/python3", "-c",
       "import sys, urllib.request\n"
       "from prometheus_client.openmetrics import parser\n"
       "asked = urllib.request.Request(sys.argv[1], headers={'Accept': sys.argv[2]})\n"
       "answer = urllib.request.urlopen(asked, timeout=10)\n"
       "print(answer.headers['Content-Type'])\n"
       "for family in parser.text_string_to_metric_families(answer.read().decode()):\n"
       "  for sample in family.samples:\n"
       "    if sample.exemplar: print(sample.name, sample.labels['le'], sample.exemplar.labels)\n"
       "    if family.name == 'tandem_x': print(family.type, sample.labels, sample.value)\n",
       "http://" + metrics.address() + "/metrics", kOpenMetricsType},
      60);
  EXPECT_EQ(read.exit_code, 0) << read.err << " (python3-prometheus-client: scripts/setup test)";
  EXPECT_THAT(read.out, AllOf(StartsWith(kOpenMetricsType),
                              HasSubstr("counter {'kind': 'a\"b\\\\c\\nd'} 3\n"),
                              EndsWith("tandem_t_seconds_bucket 0.003 {'trace_id': "
                                       "'0af7651916cd43dd8448eb211c80319c'}\n")));
}

}  // namespace
}  // namespace tandem
