#include "common/base/model_dir.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

// A Hugging Face cache of one model.
class ModelDirTest : public testing::Test {
 protected:
  ModelDirTest() { fs::create_directories(cache_); }
  ~ModelDirTest() override { fs::remove_all(cache_); }

  void AddSnapshot(const std::string& commit) {
    fs::create_directories(folder() / "snapshots" / commit);
    std::ofstream(folder() / "snapshots" / commit / "config.json") << "{}";
  }
  void SetMain(const std::string& commit) {
    fs::create_directories(folder() / "refs");
    std::ofstream(folder() / "refs/main") << commit;
  }
  fs::path folder() const { return fs::path(cache_) / "models--Qwen--Qwen2.5-0.5B"; }
  std::string Resolved(std::string dir) const {
    const absl::Status status = ResolveModelDir("--model", &dir);
    return status.ok() ? dir : std::string(status.message());
  }

  const std::string cache_ = testing::TempDir() + "tandem_hub_" +
                             testing::UnitTest::GetInstance()->current_test_info()->name();
};

TEST_F(ModelDirTest, RootOfTheCacheIsItsMainSnapshot) {
  AddSnapshot("aaa");
  AddSnapshot("bbb");
  SetMain("bbb\n");
  EXPECT_EQ(Resolved(folder()), folder() / "snapshots/bbb");
  EXPECT_EQ(DefaultModelName(Resolved(folder())), "Qwen/Qwen2.5-0.5B");
}

TEST_F(ModelDirTest, TheOnlySnapshotNeedsNoName) {
  AddSnapshot("aaa");
  EXPECT_EQ(Resolved(folder()), folder() / "snapshots/aaa");
}

TEST_F(ModelDirTest, SeveralOrNoneAreNamed) {
  fs::create_directories(folder() / "snapshots");
  EXPECT_THAT(Resolved(folder()), AllOf(HasSubstr("--model"), HasSubstr("no snapshot")));
  AddSnapshot("aaa");
  AddSnapshot("bbb");
  SetMain("ccc");
  EXPECT_THAT(Resolved(folder()), HasSubstr("aaa, bbb"));
}

TEST_F(ModelDirTest, OrgAndNameAreLookedUpInTheCache) {
  AddSnapshot("aaa");
  setenv("HF_HUB_CACHE", cache_.c_str(), 1);
  EXPECT_EQ(Resolved("Qwen/Qwen2.5-0.5B"), folder() / "snapshots/aaa");
  EXPECT_EQ(Resolved("Qwen/Qwen3-8B"), "Qwen/Qwen3-8B");
  unsetenv("HF_HUB_CACHE");
}

TEST_F(ModelDirTest, OtherDirectoriesStayAsTheyAre) {
  EXPECT_EQ(Resolved(cache_), cache_);
  EXPECT_EQ(Resolved("/no/such/model"), "/no/such/model");
  EXPECT_EQ(DefaultModelName("models/demo/"), "demo");
  EXPECT_EQ(DefaultModelName("models/./demo"), "demo");
  EXPECT_EQ(DefaultModelName("/"), "model");
  EXPECT_EQ(DefaultModelName(".."), "model");
}

}  // namespace
}  // namespace tandem
