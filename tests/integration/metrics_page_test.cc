// docs/metrics.md holds every metric of every process as the code has it, and promtool finds
// nothing to say about them. After a change:
//
//   TANDEM_WRITE_METRICS_PAGE=1 build/release/tests/metrics_page_test
#include <array>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/metrics/metrics.h"
#include "common/metrics/process_metrics.h"
#include "common/metrics/tls_metrics.h"
#include "common/trace/trace_metrics.h"
#include "decode_worker/decode_metrics.h"
#include "kvtransfer/channel/kv_counter_block.h"
#include "prefill_worker/prefill_metrics.h"
#include "router/keys/key_metrics.h"
#include "router/metrics/router_metrics.h"
#include "tests/support/paths.h"
#include "tests/support/process.h"
#include "worker/cluster_metrics.h"
#include "worker/engine_metrics.h"
#include "worker/gpu_metrics.h"

namespace tandem {
namespace {

// What one kind of process registers, made like its main does.
struct Page {
  explicit Page(std::string of) : role(std::move(of)) {
    MetricLabels labels = {{"role", role}, {"model_name", "m"}};
    if (role != "router") labels.emplace("worker", role + "-0");
    metrics.SetLabels(labels);
    AddProcessMetrics(&metrics, labels);
    AddBuildInfo(&metrics);
    TraceMetrics traces(&metrics);
    ShowExpiry(&metrics, TlsCertificate::kCluster)(absl::UnixEpoch());
    if (role == "router") {
      router = std::make_unique<router::RouterMetrics>(&metrics);
      router::KeyMetrics(&metrics, "team-a");
      router::KeysFileBroken(&metrics);
      ShowExpiry(&metrics, TlsCertificate::kPublic)(absl::UnixEpoch());
      return;
    }
    worker::AddEngineMetrics(&metrics, {});
    worker::ClusterMetrics{&metrics};
    worker::AddGpuMetrics(&metrics, labels, {"0000:01:00.0", [] {
                                               return worker::GpuReading{1, 1, 1, 1};
                                             }});
    if (role == "prefill") {
      prefill = std::make_unique<prefill::PrefillMetrics>(&metrics);
      prefill->worker.KvLink("prefill-0", "decode-0", "shm");
      prefill->worker.ShowLinks("prefill-0", {{"decode-0", {.transport = "shm"}}});
    } else {
      decode = std::make_unique<decode::DecodeMetrics>(&metrics);
      decode->worker.KvLink("prefill-0", "decode-0", "shm");
      decode->worker.ShowLinks("decode-0", {{"prefill-0", {.transport = "shm"}}});
    }
    kv = {std::make_unique<kvtransfer::KvCounterBlock>(&metrics, "sender"),
          std::make_unique<kvtransfer::KvCounterBlock>(&metrics, "receiver")};
  }

  const std::string role;
  Metrics metrics;
  std::unique_ptr<router::RouterMetrics> router;
  std::unique_ptr<prefill::PrefillMetrics> prefill;
  std::unique_ptr<decode::DecodeMetrics> decode;
  std::array<std::unique_ptr<kvtransfer::KvCounterBlock>, 2> kv;
};

const char* TypeName(prometheus::MetricType type) {
  switch (type) {
    case prometheus::MetricType::Counter:
      return "counter";
    case prometheus::MetricType::Histogram:
      return "histogram";
    default:
      return "gauge";
  }
}

struct Family {
  std::string type;
  std::string help;
  std::set<std::string> labels;  // beyond those of the process
  std::vector<std::string> roles;
};

constexpr char kHead[] =
    R"(# Metrics

Every process serves Prometheus metrics on its `--metrics-listen`; `tandem status` prints the addresses. Written by
`TANDEM_WRITE_METRICS_PAGE=1 build/release/tests/metrics_page_test` from what the processes register; the same test fails
where this page differs from the code.

Everything has the labels `role` (router, prefill, decode, unified) and `model_name`, and on workers `worker`. A name has one
meaning: what clients got is counted by the router, `tandem_worker_*` is what workers did for it, where one request passes
through several. So `sum(tandem_generation_tokens_total)` is what was served, whatever is scraped.

| name | type | further labels | of | what |
|---|---|---|---|---|
)";

std::string MarkdownOf(const std::vector<std::unique_ptr<Page>>& pages) {
  std::map<std::string, Family> families;
  for (const auto& page : pages) {
    for (const prometheus::MetricFamily& from : page->metrics.Collect()) {
      Family& family = families[from.name];
      EXPECT_TRUE(family.help.empty() || family.help == from.help)
          << from.name << " has two meanings: " << family.help << "; " << from.help;
      family.type = TypeName(from.type);
      family.help = from.help;
      family.roles.push_back(page->role);
      for (const prometheus::ClientMetric& metric : from.metric) {
        for (const auto& label : metric.label) {
          if (label.name != "role" && label.name != "worker" && label.name != "model_name") {
            family.labels.insert(label.name);
          }
        }
      }
    }
  }
  std::string out = kHead;
  for (const auto& [name, family] : families) {
    const bool all = family.roles.size() == pages.size();
    out += fmt::format("| `{}` | {} | {} | {} | {} |\n", name, family.type,
                       fmt::join(family.labels, ", "),
                       all ? "all" : fmt::format("{}", fmt::join(family.roles, ", ")), family.help);
  }
  return out;
}

std::vector<std::unique_ptr<Page>> AllPages() {
  std::vector<std::unique_ptr<Page>> pages;
  for (const char* role : {"router", "prefill", "decode"}) {
    pages.push_back(std::make_unique<Page>(role));
  }
  return pages;
}

TEST(MetricsPageTest, DocumentsEveryMetric) {
  const std::string page = MarkdownOf(AllPages());
  const std::string path = SourcePath("docs/metrics.md");
  if (std::getenv("TANDEM_WRITE_METRICS_PAGE") != nullptr) WriteFile(path, page);
  EXPECT_EQ(page, ReadWholeFile(path))
      << "write it anew: TANDEM_WRITE_METRICS_PAGE=1 build/release/tests/metrics_page_test";
}

TEST(MetricsPageTest, PromtoolFindsNothing) {
  for (const auto& page : AllPages()) {
    const Completed lint = RunCommand({"promtool", "check", "metrics"}, 60, page->metrics.Render());
    EXPECT_EQ(lint.exit_code, 0) << page->role << ": " << lint.out << lint.err
                                 << " (promtool: scripts/setup test)";
    EXPECT_EQ(lint.out + lint.err, "") << page->role;
  }
}

TEST(MetricsPageTest, AStrictReaderOfOpenMetricsTakesThem) {
  for (const auto& page : AllPages()) {
    const Completed read =
        RunCommand({"/usr/bin/python3", "-c",
                    "import sys\n"
                    "from prometheus_client.openmetrics import parser\n"
                    "print(len(list(parser.text_fd_to_metric_families(sys.stdin))))\n"},
                   60, page->metrics.RenderOpenMetrics());
    EXPECT_EQ(read.exit_code, 0) << page->role << ": " << read.err
                                 << " (python3-prometheus-client: scripts/setup test)";
    EXPECT_GT(std::atoi(read.out.c_str()), 20) << page->role;
  }
}

}  // namespace
}  // namespace tandem
