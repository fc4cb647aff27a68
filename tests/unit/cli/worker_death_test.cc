#include "cli/worker_death.h"

#include <csignal>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "cli/oom_kills.h"

namespace tandem::cli {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr uint64_t kBytes = uint64_t{14'540} << 20;

TEST(ExplainDeath, OnlyAKillNeedsIt) {
  EXPECT_EQ(ExplainDeath(SIGSEGV, {.oom_killed = true}), "");
  EXPECT_EQ(ExplainDeath(1 << 8, {.oom_killed = true}), "");  // exit code 1
}

TEST(ExplainDeath, SaysWhetherMemoryRanOut) {
  EXPECT_THAT(ExplainDeath(SIGKILL, {.oom_killed = true, .workers = 2, .worker_bytes = kBytes}),
              AllOf(HasSubstr("out of memory"), HasSubstr("2 workers x 14.2 GiB of weights")));
  EXPECT_THAT(ExplainDeath(SIGKILL, {.workers = 1, .worker_bytes = kBytes}),
              AllOf(HasSubstr("probably out of memory"), HasSubstr("1 worker x 14.2 GiB")));
  EXPECT_THAT(ExplainDeath(SIGKILL, {.oom_killed = false}), HasSubstr("from outside"));
}

// A machine in a directory.
class OomKills : public testing::Test {
 protected:
  OomKills() {
    root_ = testing::TempDir() + "/oom_kills";
    std::filesystem::remove_all(root_);
  }
  void Write(const std::string& path, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(root_ + path).parent_path());
    std::ofstream(root_ + path) << text;
  }

  std::string root_;
};

TEST_F(OomKills, OfTheProcesssOwnGroup) {
  Write("/proc/vmstat", "pgfault 9\noom_kill 7\n");
  EXPECT_EQ(CountOomKills(root_), 7u);
  Write("/proc/self/cgroup", "0::/user.slice/tandem\n");
  EXPECT_EQ(CountOomKills(root_), 7u);
  Write("/sys/fs/cgroup/user.slice/tandem/memory.events", "low 0\noom 4\noom_kill 3\n");
  EXPECT_EQ(CountOomKills(root_), 3u);
}

TEST_F(OomKills, OfVersionOneAndInAContainer) {
  Write("/proc/self/cgroup", "5:cpu:/a\n4:memory:/docker/1234\n");
  Write("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill_disable 0\noom_kill 2\n");
  EXPECT_EQ(CountOomKills(root_), 2u);
  Write("/sys/fs/cgroup/memory/docker/1234/memory.oom_control", "oom_kill 1\n");
  EXPECT_EQ(CountOomKills(root_), 1u);
}

TEST_F(OomKills, UnknownWhereNothingTells) { EXPECT_EQ(CountOomKills(root_), std::nullopt); }

}  // namespace
}  // namespace tandem::cli
