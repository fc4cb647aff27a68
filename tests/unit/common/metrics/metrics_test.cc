#include "common/metrics/metrics.h"

#include <algorithm>
#include <arpa/inet.h>
#include <map>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/metrics/process_metrics.h"

namespace tandem {
namespace {

using testing::ContainsRegex;
using testing::HasSubstr;

// GET /metrics through a raw socket, as a foreign scraper would.
std::string Scrape(const std::string& address) {
  const int port = std::stoi(address.substr(address.rfind(':') + 1));
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in peer{};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(static_cast<uint16_t>(port));
  peer.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string out;
  if (connect(fd, reinterpret_cast<sockaddr*>(&peer), sizeof(peer)) == 0) {
    const std::string request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    EXPECT_EQ(write(fd, request.data(), request.size()), static_cast<ssize_t>(request.size()));
    char buffer[4096];
    ssize_t n = 0;
    while ((n = read(fd, buffer, sizeof(buffer))) > 0) out.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
  return out;
}

TEST(MetricsTest, ServesWhatIsCounted) {
  Metrics metrics;
  EXPECT_EQ(metrics.address(), "");
  ASSERT_TRUE(metrics.Serve("127.0.0.1:0").ok());
  EXPECT_NE(metrics.address(), "127.0.0.1:0");
  metrics.Counter("tandem_things_total", "Things.", {{"kind", "a"}}).Increment(3);
  metrics.Gauge("tandem_level", "Level.").Set(2.5);
  metrics.Histogram("tandem_gap_seconds", "Gaps.", TokenGapBuckets()).Observe(0.0007);
  const std::string page = Scrape(metrics.address());
  EXPECT_THAT(page, HasSubstr("200 OK"));
  EXPECT_THAT(page, HasSubstr("# HELP tandem_things_total Things."));
  EXPECT_THAT(page, HasSubstr("tandem_things_total{kind=\"a\"} 3"));
  EXPECT_THAT(page, HasSubstr("tandem_level 2.5"));
  EXPECT_THAT(page, HasSubstr("tandem_gap_seconds_bucket{le=\"0.0005\"} 0"));
  EXPECT_THAT(page, HasSubstr("tandem_gap_seconds_bucket{le=\"0.001\"} 1"));
}

TEST(MetricsTest, ThePageIsEmptyWhenItsMetricsAreGone) {
  std::string address;
  {
    Metrics metrics;
    ASSERT_TRUE(metrics.Serve("127.0.0.1:0").ok());
    metrics.Gauge("tandem_level", "Level.").Set(1);
    address = metrics.address();
    EXPECT_THAT(Scrape(address), HasSubstr("tandem_level"));
  }
  EXPECT_THAT(Scrape(address), testing::Not(HasSubstr("tandem_level")));
}

TEST(MetricsTest, SameNameAndLabelsAreTheSameChild) {
  Metrics metrics;
  metrics.Counter("tandem_x_total", "X.", {{"k", "1"}}).Increment();
  metrics.Counter("tandem_x_total", "X.", {{"k", "1"}}).Increment();
  metrics.Counter("tandem_x_total", "X.", {{"k", "2"}}).Increment();
  EXPECT_THAT(metrics.Render(), HasSubstr("tandem_x_total{k=\"1\"} 2"));
  EXPECT_THAT(metrics.Render(), HasSubstr("tandem_x_total{k=\"2\"} 1"));
}

TEST(MetricsTest, PortInUseIsNamed) {
  Metrics first;
  ASSERT_TRUE(first.Serve("127.0.0.1:0").ok());
  Metrics second;
  const absl::Status status = second.Serve(first.address());
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr(first.address()));
  EXPECT_THAT(std::string(status.message()), HasSubstr("port in use"));
}

TEST(MetricsTest, BadAddresses) {
  for (const char* address : {"", "localhost", ":80", "127.0.0.1:99999", "127.0.0.1:x", "::1:80"}) {
    Metrics metrics;
    EXPECT_FALSE(metrics.Serve(address).ok()) << address;
  }
  Metrics metrics;
  EXPECT_THAT(std::string(metrics.Serve("no-such-host.invalid:0").message()),
              HasSubstr("no-such-host.invalid"));
}

TEST(MetricsTest, LabelsOfTheProcessStandOnEverything) {
  Metrics metrics;
  const MetricLabels labels = {{"role", "decode"}, {"worker", "d-0"}};
  metrics.SetLabels(labels);
  AddProcessMetrics(&metrics, labels);
  AddBuildInfo(&metrics);
  metrics.Counter("tandem_x_total", "X.", {{"k", "1"}}).Increment();
  const std::string page = metrics.Render();
  EXPECT_THAT(page, HasSubstr("tandem_x_total{role=\"decode\",worker=\"d-0\",k=\"1\"} 1"));
  EXPECT_THAT(page, ContainsRegex("tandem_build_info\\{role=\"decode\",worker=\"d-0\",build_type="
                                  "\"[A-Za-z]+\",commit=\"[-a-z0-9]+\",version=\"[0-9.]+\"\\} 1"));
  EXPECT_THAT(page, HasSubstr("process_open_fds{role=\"decode\",worker=\"d-0\"} "));
}

TEST(MetricsTest, TheProcessTellsItsMemoryTimeAndStart) {
  Metrics metrics;
  AddProcessMetrics(&metrics, {});
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : metrics.Collect()) {
    const prometheus::ClientMetric& metric = family.metric.front();
    values[family.name] =
        family.type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value;
  }
  EXPECT_GT(values["process_resident_memory_bytes"], 1e6);
  EXPECT_LT(values["process_resident_memory_bytes"], 1e13);
  EXPECT_GT(values["process_virtual_memory_bytes"], values["process_resident_memory_bytes"]);
  EXPECT_GE(values["process_threads"], 1);
  EXPECT_GE(values["process_open_fds"], 3);
  EXPECT_GE(values["process_max_fds"], values["process_open_fds"]);
  EXPECT_TRUE(values.contains("process_cpu_seconds_total"));
  // The time of the start is known to the tick, that of the boot to the second.
  const double now = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());
  EXPECT_LE(values["process_start_time_seconds"], now + 2);
  EXPECT_GE(values["process_start_time_seconds"], now - 3600);
}

TEST(MetricsDeathTest, MalformedNameIsABrokenInvariant) {
  Metrics metrics;
  EXPECT_DEATH(metrics.Counter("tandem-with-dash", "X."), "tandem-with-dash");
}

TEST(BucketsTest, AscendAndCoverTheirRange) {
  for (const auto* buckets :
       {&TokenGapBuckets(), &StageBuckets(), &RequestBuckets(), &BatchSizeBuckets()}) {
    EXPECT_TRUE(std::is_sorted(buckets->begin(), buckets->end(), std::less_equal<>()));
  }
  EXPECT_DOUBLE_EQ(TokenGapBuckets().front(), 0.0005);
  // Steps of 6 and 9 ms, of 9 and 12 ms are told apart.
  const auto bucket = [](double seconds) {
    return std::upper_bound(TokenGapBuckets().begin(), TokenGapBuckets().end(), seconds);
  };
  EXPECT_GE(bucket(0.0091) - bucket(0.0061), 3);
  EXPECT_GE(bucket(0.0121) - bucket(0.0091), 3);
  EXPECT_DOUBLE_EQ(StageBuckets().front(), 0.00005);
  EXPECT_DOUBLE_EQ(RequestBuckets().back(), 600);
  EXPECT_DOUBLE_EQ(BatchSizeBuckets().back(), 65536);
}

}  // namespace
}  // namespace tandem
