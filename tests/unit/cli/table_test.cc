#include "cli/table.h"

#include "gtest/gtest.h"

namespace tandem::cli {
namespace {

TEST(RenderTableTest, AlignsNumbersRightAndTextLeft) {
  EXPECT_EQ(RenderTable({{"name", "n"}, {"a", "1"}, {"longer", "100"}, {"x", "-"}}),
            "name      n\n"
            "a         1\n"
            "longer  100\n"
            "x         -\n");
}

TEST(RenderTableTest, CountsCodePointsAndTakesRaggedRows) {
  EXPECT_EQ(RenderTable({{"k", "v"}, {"\xc3\xa9\xc3\xa9", "x"}, {"only"}}),
            "k     v\n"
            "\xc3\xa9\xc3\xa9    x\n"
            "only\n");
  EXPECT_EQ(RenderTable({}), "");
}

}  // namespace
}  // namespace tandem::cli
