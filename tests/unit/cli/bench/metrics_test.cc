// From records to figures, and how they are shown.
#include "cli/bench/metrics.h"

#include <algorithm>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/bench/report.h"
#include "common/base/status.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using testing::DoubleEq;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

absl::Time At(double ms) { return absl::UnixEpoch() + absl::Milliseconds(ms); }

// Due at `intended`; tokens one by one at the given times, the last of which is the end.
RequestRecord Answered(double intended, const std::vector<double>& arrivals, size_t turn = 0) {
  RequestRecord record;
  record.turn = turn;
  record.intended = At(intended);
  record.sent = At(intended + 2);
  for (const double at : arrivals) record.arrivals.push_back({At(at), 1});
  record.ended = At(arrivals.back());
  record.prompt_tokens = 10;
  record.usage.cached_tokens = 4;
  record.usage.stages[Stage::kTotal] = 8;
  return record;
}

RequestRecord Refused(absl::Status status) {
  RequestRecord record;
  record.intended = record.sent = record.ended = At(0);
  record.status = std::move(status);
  return record;
}

const std::vector<double> kP99 = {99};

TEST(Metrics, PercentilesAreThoseOfNumpy) {
  EXPECT_EQ(Percentile({}, 50), 0);
  const std::vector<double> four = {1, 2, 4, 8};
  EXPECT_DOUBLE_EQ(Percentile(four, 0), 1);
  EXPECT_DOUBLE_EQ(Percentile(four, 50), 3);
  EXPECT_DOUBLE_EQ(Percentile(four, 90), 6.8);  // numpy.percentile([1, 2, 4, 8], 90)
  EXPECT_DOUBLE_EQ(Percentile(four, 100), 8);

  std::vector<double> values;
  for (int i = 0; i <= 1000; ++i) values.push_back(i);
  std::shuffle(values.begin(), values.end(), std::mt19937(1));
  const Distribution summary = Summarize(values, std::vector<double>{99, 99.9, 5});
  EXPECT_THAT(summary.percentiles, ElementsAre(990, DoubleEq(999), 50));
  EXPECT_DOUBLE_EQ(summary.mean, 500);
  EXPECT_DOUBLE_EQ(summary.median, 500);
  EXPECT_NEAR(summary.deviation, 288.96, 0.01);
}

TEST(Metrics, CountFromTheIntendedTime) {
  const std::vector<RequestRecord> records = {Answered(0, {100, 110, 130}),
                                              Answered(50, {450, 470})};
  const BenchMetrics metrics = Measure(records, absl::Seconds(2), std::nullopt, kP99);
  EXPECT_DOUBLE_EQ(metrics.ttft.mean, 250);  // 100 and 400, not what was left after the sending
  EXPECT_DOUBLE_EQ(metrics.e2el.mean, (130 + 420) / 2.0);
  EXPECT_DOUBLE_EQ(metrics.tpot.mean, (15 + 20) / 2.0);
  EXPECT_DOUBLE_EQ(metrics.itl.mean, (10 + 20 + 20) / 3.0);
  EXPECT_DOUBLE_EQ(metrics.send_delay.mean, 2);
  EXPECT_EQ(metrics.output_tokens, 5);
  EXPECT_EQ(metrics.input_tokens, 20);
  EXPECT_EQ(metrics.cached_tokens, 8);
  EXPECT_DOUBLE_EQ(metrics.PerSecond(5), 2.5);
  EXPECT_DOUBLE_EQ(metrics.stages[Stage::kTotal], 8);
  EXPECT_EQ(metrics.peak_concurrency, 2u);
  EXPECT_TRUE(metrics.ttft_of_turn.empty());
}

TEST(Metrics, OneTokenHasNoTimePerToken) {
  const std::vector<RequestRecord> records = {Answered(0, {100})};
  const BenchMetrics metrics =
      Measure(records, absl::Seconds(1), ParseGoodput({"tpot:1"}).value(), kP99);
  EXPECT_EQ(metrics.tpot.mean, 0);
  EXPECT_EQ(metrics.itl.percentiles[0], 0);
  EXPECT_EQ(metrics.good, 1u);
}

TEST(Metrics, TheBestSecondSlides) {
  std::vector<double> arrivals;
  for (int i = 0; i < 10; ++i) arrivals.push_back(700 + 60 * i);  // across a full second
  arrivals.push_back(5000);
  const std::vector<RequestRecord> records = {Answered(0, arrivals)};
  EXPECT_EQ(Measure(records, absl::Seconds(5), std::nullopt, {}).peak_output_tokens_per_s, 10);
}

TEST(Metrics, GoodIsWhoKeepsAllLimits) {
  const std::vector<RequestRecord> records = {Answered(0, {100, 110}), Answered(0, {100, 160}),
                                              Answered(0, {600, 610}),
                                              Refused(absl::UnavailableError("gone"))};
  const auto goodput = ParseGoodput({"ttft:500", "tpot:50"});
  ASSERT_OK(goodput);
  EXPECT_EQ(Measure(records, absl::Seconds(1), *goodput, kP99).good, 1u);
  EXPECT_EQ(Measure(records, absl::Seconds(1), std::nullopt, kP99).good, std::nullopt);
  for (const char* wrong : {"ttft", "ttft:", "ttft:x", "ttft:-1", "speed:5", ":5"}) {
    EXPECT_THAT(MessageOf(ParseGoodput({wrong}).status()), HasSubstr("--goodput")) << wrong;
  }
}

TEST(Metrics, FailuresAreCountedByStatus) {
  const std::vector<RequestRecord> records = {
      Answered(0, {5, 6}), Refused(absl::ResourceExhaustedError("full 1")),
      Refused(absl::UnavailableError("gone")), Refused(absl::ResourceExhaustedError("full 2"))};
  const BenchMetrics metrics = Measure(records, absl::Seconds(1), std::nullopt, kP99);
  EXPECT_EQ(metrics.completed, 1u);
  EXPECT_EQ(metrics.failed, 3u);
  EXPECT_EQ(metrics.failures.at("RESOURCE_EXHAUSTED").count, 2);
  EXPECT_EQ(metrics.failures.at("RESOURCE_EXHAUSTED").example, "full 1");
  EXPECT_EQ(metrics.failures.at("UNAVAILABLE").count, 1);
  EXPECT_DOUBLE_EQ(metrics.ttft.mean, 5);  // of those that were answered
  const std::string report = RenderReport({}, metrics);
  EXPECT_THAT(report, HasSubstr("RESOURCE_EXHAUSTED:                      2"));
  EXPECT_THAT(report, HasSubstr("e.g. full 1"));
  EXPECT_EQ(ReportJson({}, metrics)["errors_by_status"]["UNAVAILABLE"], 1);
}

TEST(Metrics, TurnsHaveTheirOwnFirstTokens) {
  const std::vector<RequestRecord> records = {Answered(0, {100, 110}),
                                              Answered(110, {140, 150}, 1)};
  const BenchMetrics metrics = Measure(records, absl::Seconds(1), std::nullopt, kP99);
  ASSERT_EQ(metrics.ttft_of_turn.size(), 2u);
  EXPECT_DOUBLE_EQ(metrics.ttft_of_turn[0].median, 100);
  EXPECT_DOUBLE_EQ(metrics.ttft_of_turn[1].median, 30);
  EXPECT_THAT(RenderReport({}, metrics), HasSubstr("Median TTFT turn 2 (ms):"));
  EXPECT_DOUBLE_EQ(ReportJson({}, metrics)["median_ttft_turn2_ms"], 30);
}

TEST(Report, HasTheLinesOfVllmBenchServe) {
  const std::vector<RequestRecord> records = {Answered(0, {100, 110, 130})};
  const BenchMetrics metrics =
      Measure(records, absl::Seconds(2), ParseGoodput({"ttft:500"}).value(), kP99);
  BenchSetup setup;
  setup.request_rate = 4;
  setup.max_concurrency = 8;
  const std::string report = RenderReport(setup, metrics);
  for (const char* line : {
           "============ Serving Benchmark Result ============\n",
           "Successful requests:                     1         \n",
           "Maximum request concurrency:             8         \n",
           "Request rate configured (RPS):           4.00      \n",
           "Benchmark duration (s):                  2.00      \n",
           "Total input tokens:                      10        \n",
           "Total generated tokens:                  3         \n",
           "Request throughput (req/s):              0.50      \n",
           "Request goodput (req/s):                 0.50      \n",
           "Output token throughput (tok/s):         1.50      \n",
           "Total token throughput (tok/s):          6.50      \n",
           "---------------Time to First Token----------------\n",
           "Mean TTFT (ms):                          100.00    \n",
           "Median TTFT (ms):                        100.00    \n",
           "P99 TTFT (ms):                           100.00    \n",
           "-----Time per Output Token (excl. 1st token)------\n",
           "Mean TPOT (ms):                          15.00     \n",
           "---------------Inter-token Latency----------------\n",
           "Median ITL (ms):                         15.00     \n",
           "----------------End-to-end Latency----------------\n",
           "P99 E2EL (ms):                           130.00    \n",
       }) {
    EXPECT_THAT(report, HasSubstr(line));
  }
  setup.metrics = {"tpot"};
  setup.percentiles = {};
  EXPECT_THAT(RenderReport(setup, Measure(records, absl::Seconds(2), std::nullopt, {})),
              Not(HasSubstr("TTFT (ms)")));
}

TEST(Report, ShowsTwoRunsSideBySide) {
  const std::vector<RequestRecord> ours = {Answered(0, {100, 110, 130})};
  const std::vector<RequestRecord> theirs = {Answered(0, {50, 90, 130}),
                                             Refused(absl::UnavailableError("gone"))};
  BenchSetup setup;
  setup.metrics = {"ttft"};
  const std::string table =
      RenderComparison(setup, Measure(ours, absl::Seconds(2), std::nullopt, kP99),
                       Measure(theirs, absl::Seconds(4), std::nullopt, kP99), "http://peer/v1");
  for (const char* line : {
           "                                 tandem-grpc  http://peer/v1  ratio\n",
           "Failed requests                            0               1\n",
           "Total input tokens                        10              10\n",
           "Output token throughput (tok/s)         1.50            0.75   2.00\n",
           "Median TTFT (ms)                      100.00           50.00   2.00\n",
           "P99 TTFT (ms)                         100.00           50.00   2.00\n",
       }) {
    EXPECT_THAT(table, HasSubstr(line));
  }
  EXPECT_THAT(table, Not(HasSubstr("E2EL")));
}

TEST(Report, HasTheKeysOfVllmBenchServe) {
  const std::vector<RequestRecord> records = {Answered(0, {100, 110, 130})};
  BenchSetup setup;
  setup.percentiles = {50, 99.9};
  nlohmann::ordered_json json =
      ReportJson(setup, Measure(records, absl::Seconds(2), std::nullopt, setup.percentiles));
  AddDetails(records, &json);
  for (const char* key : {"date",
                          "model_id",
                          "num_prompts",
                          "request_rate",
                          "burstiness",
                          "max_concurrency",
                          "duration",
                          "completed",
                          "failed",
                          "total_input_tokens",
                          "total_output_tokens",
                          "request_throughput",
                          "request_goodput",
                          "output_throughput",
                          "total_token_throughput",
                          "mean_ttft_ms",
                          "median_ttft_ms",
                          "std_ttft_ms",
                          "p50_ttft_ms",
                          "p99.9_ttft_ms",
                          "mean_tpot_ms",
                          "p50_itl_ms",
                          "p99.9_e2el_ms",
                          "input_lens",
                          "output_lens",
                          "ttfts",
                          "itls",
                          "errors"}) {
    EXPECT_TRUE(json.contains(key)) << key;
  }
  EXPECT_EQ(json["request_rate"], "inf");
  EXPECT_DOUBLE_EQ(json["ttfts"][0], 0.1);
  EXPECT_DOUBLE_EQ(json["itls"][0][1], 0.02);
}

TEST(Report, ListsOfFlagsAreChecked) {
  EXPECT_THAT(ParseMetricNames("ttft,itl").value(), ElementsAre("ttft", "itl"));
  EXPECT_THAT(MessageOf(ParseMetricNames("ttft,speed").status()), HasSubstr("'speed'"));
  EXPECT_THAT(ParsePercentiles("50,99.9").value(), ElementsAre(50, 99.9));
  EXPECT_THAT(MessageOf(ParsePercentiles("50,101").status()), HasSubstr("'101'"));
}

}  // namespace
}  // namespace tandem::cli
