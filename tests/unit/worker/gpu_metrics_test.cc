#include "worker/gpu_metrics.h"

#include <atomic>
#include <memory>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace tandem::worker {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kMemory[] = "tandem_gpu_memory_bytes{gpu=\"0000:01:00.0\"} 24";

// What a driver's thread may still have when the test is over.
struct Driver {
  std::atomic<bool> hangs = false;
  std::atomic<int> asked = 0;
  absl::Notification goes_on;
};

void AwaitMemoryOn(const Metrics& metrics) {
  const absl::Time begin = absl::Now();
  while (metrics.Render().find(kMemory) == std::string::npos) {
    ASSERT_LT(absl::Now() - begin, absl::Seconds(60));
    absl::SleepFor(absl::Milliseconds(5));
  }
}

TEST(GpuMetrics, ADriverThatHangsHoldsNoPage) {
  const auto driver = std::make_shared<Driver>();
  Metrics metrics;
  AddGpuMetrics(&metrics, {}, {"0000:01:00.0", [driver] {
                                 ++driver->asked;
                                 if (driver->hangs) driver->goes_on.WaitForNotification();
                                 GpuReading reading;
                                 reading.memory_bytes = 24;
                                 return reading;
                               }});
  metrics.Counter("other", "of the process").Increment();
  AwaitMemoryOn(metrics);
  driver->hangs = true;
  const int before = driver->asked;
  for (int page = 0; page < 3; ++page) {
    EXPECT_THAT(metrics.Render(), AllOf(HasSubstr("other 1"), Not(HasSubstr(kMemory))));
  }
  EXPECT_EQ(driver->asked, before + 1) << "asked again while it hung";
  driver->goes_on.Notify();
  AwaitMemoryOn(metrics);
}

}  // namespace
}  // namespace tandem::worker
