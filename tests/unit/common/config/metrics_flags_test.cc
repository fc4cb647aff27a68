#include "common/config/metrics_flags.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(MetricsFlags, BeyondLoopbackTheyNeedTlsOrTheWord) {
  for (const char* local : {"127.0.0.1:0", "localhost:9090", "[::1]:9090"}) {
    EXPECT_OK(CheckMetricsFlags({.listen = local}, false));
  }
  for (const char* reachable : {"0.0.0.0:0", "[::]:9090", "192.0.2.1:9090", "host:9090"}) {
    const absl::Status refused = CheckMetricsFlags({.listen = reachable}, true);
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << reachable;
    EXPECT_THAT(MessageOf(refused), AllOf(HasSubstr(reachable), HasSubstr("--metrics-tls"),
                                          HasSubstr("--metrics-insecure")));
    EXPECT_OK(CheckMetricsFlags({.listen = reachable, .tls = true}, true));
    EXPECT_OK(CheckMetricsFlags({.listen = reachable, .insecure = true}, false));
  }
}

TEST(MetricsFlags, AreNamedWhereTheyAreWrong) {
  EXPECT_THAT(MessageOf(CheckMetricsFlags({.tls = true}, false)),
              HasSubstr("--metrics-tls needs --cluster-cert"));
  EXPECT_THAT(MessageOf(CheckMetricsFlags({.listen = "9090"}, false)),
              HasSubstr("--metrics-listen: address '9090'"));
}

}  // namespace
}  // namespace tandem
