#include "common/base/stage.h"

#include <string>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/file.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

TEST(StageTable, StandsInTheReadme) {
  const auto readme = ReadFile(SourcePath("README.md"));
  ASSERT_OK(readme);
  for (const StageInfo& info : kStages) {
    EXPECT_THAT(*readme, testing::HasSubstr(fmt::format("| `{}` | {} |", info.name, info.help)));
  }
}

}  // namespace
}  // namespace tandem
