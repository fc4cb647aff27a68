// What deploy/ says to Prometheus and Grafana fits what the processes tell, and promtool has every
// alert fire and keep quiet as it should: scripts/check_monitoring, which is tried itself.
#include <filesystem>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

using testing::HasSubstr;

Completed Check(const std::string& deploy) {
  return RunCommand({"/usr/bin/python3", SourcePath("scripts/check_monitoring"), deploy}, 500);
}

TEST(Monitoring, FitsWhatProcessesTell) {
  const Completed check = Check(SourcePath("deploy"));
  EXPECT_EQ(check.exit_code, 0) << check.out << check.err;
  if (check.out.find("skip  promtool") != std::string::npos) GTEST_SKIP() << check.out;
}

// A copy of deploy/ in which `from` has become `to`.
class Changed {
 public:
  Changed(const std::string& file, const std::string& from, const std::string& to) {
    for (const char* folder : {"prometheus", "dashboards"}) {
      std::filesystem::copy(SourcePath("deploy/") + folder, dir_.path() + "/" + folder,
                            std::filesystem::copy_options::recursive);
    }
    const std::string path = dir_.path() + "/" + file;
    std::string text = ReadWholeFile(path);
    const size_t at = text.find(from);
    EXPECT_NE(at, text.npos) << file << " no longer has: " << from;
    if (at != text.npos) text.replace(at, from.size(), to);
    WriteFile(path, text);
  }
  const std::string& path() const { return dir_.path(); }

 private:
  TempDir dir_;
};

struct Mistake {
  const char* name;
  const char* file;
  const char* from;
  const char* to;
  const char* found;
};

class Mistakes : public testing::TestWithParam<Mistake> {};

TEST_P(Mistakes, AreFound) {
  const Changed deploy(GetParam().file, GetParam().from, GetParam().to);
  const Completed check = Check(deploy.path());
  if (check.out.find("skip  promtool") != std::string::npos) GTEST_SKIP() << check.out;
  EXPECT_EQ(check.exit_code, 1) << check.err;
  EXPECT_THAT(check.out, HasSubstr(GetParam().found));
}

INSTANTIATE_TEST_SUITE_P(
    All, Mistakes,
    testing::Values(
        Mistake{"MetricThatIsNot", "prometheus/tandem.alerts.yml", "process_open_fds{",
                "process_opened_fds{",
                "TandemDescriptorsNearlyGone: no process has the metric process_opened_fds"},
        Mistake{"LabelThatIsNot", "prometheus/tandem.rules.yml", "{code=\"RESOURCE_EXHAUSTED\"}",
                "{status=\"RESOURCE_EXHAUSTED\"}",
                "tandem:requests_refused:ratio_rate5m: tandem_requests_total has no label status"},
        Mistake{"LabelOfAnotherPanel", "dashboards/tandem-latency.json", "sum by (code) (rate(",
                "sum by (stage) (rate(",
                "Requests by status: grouped by stage, which none of its metrics has"},
        Mistake{"PanelWrittenByHand", "dashboards/tandem-latency.json", "\"Tokens\"", "\"tokens\"",
                "tandem-latency.json: not as deploy/dashboards/generate writes it"},
        Mistake{"AlertWithoutQuietCase", "prometheus/tandem.tests.yml", "exp_alerts: []", "",
                "TandemProcessDown: no test in which it does not fire"},
        Mistake{"WhatPromtoolFinds", "prometheus/tandem.alerts.yml", "up{job=\"tandem\"} == 0",
                "up{job=\"tandem\"} ==", "promtool check config prometheus-kubernetes.yml: "},
        Mistake{"RunbookWithoutSection", "prometheus/tandem.alerts.yml", "#tandemlinkslow",
                "#tandemslowlink", "TandemLinkSlow: its runbook is not"}),
    [](const auto& tested) { return std::string(tested.param.name); });

}  // namespace
}  // namespace tandem
