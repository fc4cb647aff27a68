#include "cli/gpu_placement.h"

#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::cli {
namespace {

TEST(CountGpus, ByDeviceNodesOrByWhatIsVisible) {
  const auto folder = std::filesystem::path(testing::TempDir()) / "gpu_nodes";
  std::filesystem::create_directories(folder);
  for (const char* name : {"nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia"}) {
    std::ofstream(folder / name) << "";
  }
  EXPECT_EQ(CountGpus(folder.string(), nullptr), 3);
  EXPECT_EQ(CountGpus(folder.string(), "0"), 1);
  EXPECT_EQ(CountGpus(folder.string(), "GPU-a,GPU-b"), 2);
  EXPECT_EQ(CountGpus(folder.string(), ""), 0);
  EXPECT_EQ(CountGpus(folder.string(), "-1"), 0);
  EXPECT_EQ(CountGpus((folder / "none").string(), nullptr), 0);
  std::filesystem::remove_all(folder);
}

TEST(PlaceOnGpus, InTurnsWithEqualShares) {
  EXPECT_TRUE(PlaceOnGpus(3, 0).empty());
  const auto places = PlaceOnGpus(5, 2);
  ASSERT_EQ(places.size(), 5u);
  for (size_t i = 0; i < places.size(); ++i) {
    EXPECT_EQ(places[i].gpu, static_cast<int>(i % 2));
    EXPECT_DOUBLE_EQ(places[i].memory_share, i % 2 == 0 ? 1.0 / 3 : 0.5);
  }
  for (const GpuPlace& place : PlaceOnGpus(4, 4)) EXPECT_EQ(place.memory_share, 1);
}

TEST(PlaceOnGpus, AsManyEachAsAModelHasRanks) {
  const auto places = PlaceOnGpus(3, 5, 2);
  ASSERT_EQ(places.size(), 3u);
  for (size_t i = 0; i < places.size(); ++i) {
    EXPECT_EQ(places[i].gpu, static_cast<int>(i % 2 * 2));
    EXPECT_DOUBLE_EQ(places[i].memory_share, i == 1 ? 1 : 0.5);
  }
  EXPECT_EQ(PlaceOnGpus(2, 1, 4)[1].gpu, 0);  // a worker says that these are too few
  EXPECT_TRUE(PlaceOnGpus(2, 0, 0).empty());  // as --devices has it where no GPU is known of
}

}  // namespace
}  // namespace tandem::cli
