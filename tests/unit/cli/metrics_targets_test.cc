#include "cli/metrics_targets.h"

#include <filesystem>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "common/base/file.h"
#include "common/base/status.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

TEST(MetricsTargetsTest, PortsFollowTheRouters) {
  EXPECT_EQ(MetricsListen("127.0.0.1", 9090, 0), "127.0.0.1:9090");
  EXPECT_EQ(MetricsListen("127.0.0.1", 9090, 3), "127.0.0.1:9093");
  EXPECT_EQ(MetricsListen("0.0.0.0", 0, 3), "0.0.0.0:0");
  EXPECT_EQ(MetricsListen("::1", 9090, 1), "[::1]:9091");
}

TEST(MetricsTargetsTest, IsWhatPrometheusReads) {
  const auto list = nlohmann::json::parse(MetricsTargets({"127.0.0.1:9090", "0.0.0.0:9091"}));
  ASSERT_EQ(list.size(), 1u);
  ASSERT_EQ(list[0]["targets"].size(), 2u);
  EXPECT_EQ(list[0]["targets"][0], "127.0.0.1:9090");
  char name[256] = {};
  ASSERT_EQ(gethostname(name, sizeof(name) - 1), 0);
  EXPECT_EQ(list[0]["targets"][1], std::string(name) + ":9091");
}

TEST(MetricsTargetsTest, TheFileFollowsAndGoes) {
  const std::string path = testing::TempDir() + "/targets-" + std::to_string(getpid()) + ".json";
  {
    MetricsTargetsFile file(path);
    EXPECT_FALSE(std::filesystem::exists(path));
    ASSERT_OK(file.Set({"127.0.0.1:1"}));
    EXPECT_EQ(*ReadFile(path), MetricsTargets({"127.0.0.1:1"}));
    ASSERT_OK(file.Set({"127.0.0.1:1", "127.0.0.1:2"}));
    EXPECT_EQ(*ReadFile(path), MetricsTargets({"127.0.0.1:1", "127.0.0.1:2"}));
    EXPECT_FALSE(std::filesystem::exists(path + ".new"));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  const absl::Status status = MetricsTargetsFile("/no/such/dir/x.json").Set({});
  EXPECT_EQ(MessageOf(status), "--metrics-sd-file /no/such/dir/x.json: No such file or directory");
  EXPECT_OK(MetricsTargetsFile("").Set({}));
}

}  // namespace
}  // namespace tandem::cli
