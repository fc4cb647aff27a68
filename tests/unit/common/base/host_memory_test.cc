#include "common/base/host_memory.h"

#include <filesystem>
#include <fstream>
#include <optional>
#include <string>

#include "gtest/gtest.h"

namespace tandem {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

// A machine of 1,000 MiB, 800 of them available, whose files a test lays out.
class HostMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::remove_all(dir_);
    Write("/proc/meminfo", "MemTotal: 1024000 kB\nMemFree: 5 kB\nMemAvailable: 819200 kB\n");
  }

  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Write(const std::string& path, const std::string& text) {
    const std::string whole = dir_ + path;
    std::filesystem::create_directories(std::filesystem::path(whole).parent_path());
    std::ofstream(whole) << text;
  }
  void Mount(const std::string& group_root, const std::string& at, const std::string& type) {
    mounts_ += "30 24 0:26 " + group_root + " " + at + " rw shared:9 - " + type + "\n";
    Write("/proc/self/mountinfo", mounts_);
  }
  void Group2(const std::string& folder, const std::string& limit, size_t used, size_t cache) {
    Write(folder + "/memory.max", limit + "\n");
    Write(folder + "/memory.current", std::to_string(used) + "\n");
    Write(folder + "/memory.stat", "anon 1\ninactive_file " + std::to_string(cache) + "\n");
  }
  HostMemory Read() const { return ReadHostMemory(dir_); }

  const std::string dir_ = testing::TempDir() + "host_memory_test_" +
                           testing::UnitTest::GetInstance()->current_test_info()->name();
  std::string mounts_ = "22 1 8:1 / / rw - ext4 /dev/sda rw\n";
};

TEST_F(HostMemoryTest, WithoutGroupsItIsTheMachines) {
  const HostMemory memory = Read();
  EXPECT_EQ(memory.total, 1000 * kMiB);
  EXPECT_EQ(memory.available, 800 * kMiB);
  EXPECT_EQ(memory.limited_by, "this machine");
}

TEST_F(HostMemoryTest, OwnGroupOfVersion2Counts) {
  Mount("/", "/sys/fs/cgroup", "cgroup2 cgroup2 rw,nsdelegate");
  Write("/proc/self/cgroup", "0::/system.slice/tandem.service\n");
  Group2("/sys/fs/cgroup/system.slice", "max", 700 * kMiB, 0);
  Group2("/sys/fs/cgroup/system.slice/tandem.service", std::to_string(500 * kMiB), 150 * kMiB,
         50 * kMiB);
  const HostMemory memory = Read();
  EXPECT_EQ(memory.total, 500 * kMiB);
  EXPECT_EQ(memory.available, 400 * kMiB);  // what files may be dropped for is not used up
  EXPECT_EQ(memory.limited_by, "/sys/fs/cgroup/system.slice/tandem.service/memory.max");
}

TEST_F(HostMemoryTest, GroupsAboveCountToo) {
  Mount("/", "/sys/fs/cgroup", "cgroup2 cgroup2 rw");
  Write("/proc/self/cgroup", "0::/a/b/c\n");
  Group2("/sys/fs/cgroup/a", std::to_string(300 * kMiB), 290 * kMiB, 0);
  Group2("/sys/fs/cgroup/a/b", std::to_string(900 * kMiB), 280 * kMiB, 0);
  Group2("/sys/fs/cgroup/a/b/c", "max", 270 * kMiB, 0);
  EXPECT_EQ(Read().total, 300 * kMiB);
  EXPECT_EQ(Read().available, 10 * kMiB);
}

TEST_F(HostMemoryTest, AGroupOverItsLimitLeavesNothing) {
  Mount("/", "/sys/fs/cgroup", "cgroup2 cgroup2 rw");
  Write("/proc/self/cgroup", "0::/\n");
  Group2("/sys/fs/cgroup", std::to_string(100 * kMiB), 120 * kMiB, 0);
  EXPECT_EQ(Read().available, 0u);
}

// As in a container of version 1 without a namespace of its own: what is mounted is its group.
TEST_F(HostMemoryTest, Version1WithinAContainer) {
  Mount("/docker/abc", "/sys/fs/cgroup/cpu", "cgroup cgroup rw,cpu,cpuacct");
  Mount("/docker/abc", "/sys/fs/cgroup/memory", "cgroup cgroup rw,memory");
  Write("/proc/self/cgroup", "5:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc/inner\n0::/x\n");
  const std::string top = "/sys/fs/cgroup/memory";
  Write(top + "/memory.limit_in_bytes", std::to_string(600 * kMiB));
  Write(top + "/memory.usage_in_bytes", std::to_string(100 * kMiB));
  Write(top + "/memory.stat", "total_inactive_file 0\n");
  Write(top + "/inner/memory.limit_in_bytes", "9223372036854771712");  // none
  Write(top + "/inner/memory.usage_in_bytes", "4096");
  const HostMemory memory = Read();
  EXPECT_EQ(memory.total, 600 * kMiB);
  EXPECT_EQ(memory.available, 500 * kMiB);
  EXPECT_EQ(memory.limited_by, "/sys/fs/cgroup/memory/memory.limit_in_bytes");
}

TEST_F(HostMemoryTest, TheKernelSaysWhetherSharedMemoryHasHugePages) {
  EXPECT_FALSE(SharedMemoryHasHugePages(dir_));  // a kernel without them
  const std::string file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
  Write(file, "always within_size advise [never] deny force\n");
  EXPECT_FALSE(SharedMemoryHasHugePages(dir_));
  Write(file, "always within_size [advise] never deny force\n");
  EXPECT_TRUE(SharedMemoryHasHugePages(dir_));
}

TEST_F(HostMemoryTest, OfAProcessCountsWhatWouldComeBackAtItsEnd) {
  Write("/proc/7/smaps_rollup",
        "55d0-7ffd ---p 00000000 00:00 0 [rollup]\nRss: 9000 kB\nPss: 5000 kB\n"
        "Pss_Anon: 1024 kB\nPss_File: 2928 kB\nPss_Shmem: 1048 kB\n");
  EXPECT_EQ(ReadProcessMemory(7, dir_), size_t{2072} << 10);
  EXPECT_EQ(ReadProcessMemory(8, dir_), std::nullopt);
}

TEST(ReadHostMemory, ThisMachineHasSome) {
  const HostMemory memory = ReadHostMemory();
  EXPECT_GT(memory.total, size_t{64} << 20);
  EXPECT_GT(memory.available, 0u);
  EXPECT_LE(memory.available, memory.total);
}

}  // namespace
}  // namespace tandem
