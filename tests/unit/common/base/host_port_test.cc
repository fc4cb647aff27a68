#include "common/base/host_port.h"

#include "gtest/gtest.h"

namespace tandem {
namespace {

TEST(IsLoopback, IsSaidOfAddressesAndOfOneName) {
  for (const char* host : {"127.0.0.1", "127.255.0.3", "::1", "localhost"}) {
    EXPECT_TRUE(IsLoopback(host)) << host;
  }
  for (const char* host : {"127.example.com", "127.0.0.1.example.com", "127.", "127.0.0.256",
                           "0.0.0.0", "10.0.0.1", "::", "localhost.example.com", ""}) {
    EXPECT_FALSE(IsLoopback(host)) << host;
  }
}

}  // namespace
}  // namespace tandem
