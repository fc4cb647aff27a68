// Where tests find things.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "gtest/gtest.h"

namespace tandem {

// A file of the source tree, e.g. SourcePath("models/demo").
std::string SourcePath(const std::string& relative);
// A built program, e.g. BinaryPath("tandem").
std::string BinaryPath(const std::string& name);
// The optional folder with large reference data (TANDEM_SHARED_DIR, else ../shared beside the
// source tree); "" if absent.
std::string SharedDir();

}  // namespace tandem

// Skips the test, with a reason, where the large reference data is absent.
#define TANDEM_REQUIRE_SHARED()                                                           \
  do {                                                                                    \
    if (::tandem::SharedDir().empty()) {                                                  \
      GTEST_SKIP() << "large reference data absent: set TANDEM_SHARED_DIR to its folder"; \
    }                                                                                     \
  } while (false)

#define ASSERT_OK(expr)                                 \
  do {                                                  \
    const auto& ok_ = (expr);                           \
    ASSERT_TRUE(ok_.ok()) << ::tandem::StatusText(ok_); \
  } while (false)
#define EXPECT_OK(expr)                                 \
  do {                                                  \
    const auto& ok_ = (expr);                           \
    EXPECT_TRUE(ok_.ok()) << ::tandem::StatusText(ok_); \
  } while (false)

namespace tandem {

inline std::string StatusText(const absl::Status& status) { return status.ToString(); }
template <typename T>
std::string StatusText(const T& status_or) {
  return status_or.status().ToString();
}

}  // namespace tandem
