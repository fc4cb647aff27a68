#include "common/rpc/worker_process.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

TEST(AdvertisedAddress, IsTheBoundOneUnlessThatNamesNoHost) {
  WorkerProcessOptions options;
  auto address = AdvertisedAddress(options, "10.1.2.3:500");
  ASSERT_OK(address);
  EXPECT_EQ(*address, "10.1.2.3:500");
  address = AdvertisedAddress(options, "0.0.0.0:500");
  ASSERT_OK(address);
  EXPECT_THAT(*address,
              testing::AllOf(testing::EndsWith(":500"), testing::Not(testing::StartsWith("0."))));
  options.advertise_host = "worker-7.cluster";
  for (const char* bound : {"0.0.0.0:500", "10.1.2.3:500"}) {
    address = AdvertisedAddress(options, bound);
    ASSERT_OK(address);
    EXPECT_EQ(*address, "worker-7.cluster:500");
  }
  EXPECT_FALSE(AdvertisedAddress(options, "no port").ok());
}

TEST(AdvertisedMetricsAddress, IsTheBoundOneWhereNobodyElseReachesIt) {
  WorkerProcessOptions options;
  options.advertise_host = "worker-7.cluster";
  for (const char* bound : {"127.0.0.1:900", "[::1]:900"}) {
    const auto address = AdvertisedMetricsAddress(options, bound);
    ASSERT_OK(address);
    EXPECT_EQ(*address, bound);
  }
  const auto address = AdvertisedMetricsAddress(options, "0.0.0.0:900");
  ASSERT_OK(address);
  EXPECT_EQ(*address, "worker-7.cluster:900");
}

TEST(RoutersOf, TakesLists) {
  WorkerProcessOptions options;
  auto routers = RoutersOf(options);
  ASSERT_OK(routers);
  EXPECT_THAT(*routers, testing::IsEmpty());
  options.routers = {"a:1,b:2,", "[::1]:3", "b:2"};
  routers = RoutersOf(options);
  ASSERT_OK(routers);
  EXPECT_THAT(*routers,
              testing::ElementsAre(HostPort{"a", 1}, HostPort{"b", 2}, HostPort{"::1", 3}));
  options.routers = {"a:1,b"};
  EXPECT_THAT(std::string(RoutersOf(options).status().message()),
              testing::StartsWith("--router: address 'b' must be HOST:PORT"));
}

TEST(RunWorkerProcess, BadFlagsEndItBeforeItStarts) {
  WorkerProcessOptions options;
  FlagSet flags("worker", "A worker.");
  AddWorkerProcessFlags(&flags, &options);
  WorkerMain parts{.flags = &flags, .options = &options, .kind = "test"};
  int starts = 0;
  parts.validate = [] { return absl::OkStatus(); };
  parts.start = [&](SignalWaiter*) -> absl::StatusOr<std::unique_ptr<WorkerProcess>> {
    ++starts;
    return absl::InternalError("no engine");
  };
  const char* unknown[] = {"worker", "--lisen", "x"};
  EXPECT_EQ(RunWorkerProcess(parts, 3, unknown), 2);
  EXPECT_EQ(starts, 0);
  const char* good[] = {"worker", "--worker-id", "w0"};
  EXPECT_EQ(RunWorkerProcess(parts, 3, good), 1);
  EXPECT_EQ(starts, 1);
}

}  // namespace
}  // namespace tandem
