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

TEST(RenderTableTest, LeavesOutColumnsUntilItFits) {
  const std::vector<std::vector<std::string>> rows = {
      {"name", "n", "where"}, {"a", "1", "127.0.0.1:80"}, {"b"}};
  EXPECT_EQ(RenderTable(rows, 21, {"where", "n"}), RenderTable(rows));
  EXPECT_EQ(RenderTable(rows, 20, {"where", "n"}),
            "name  n\n"
            "a     1\n"
            "b\n");
  EXPECT_EQ(RenderTable(rows, 6, {"where", "n"}),
            "name\n"
            "a\n"
            "b\n");
}

}  // namespace
}  // namespace tandem::cli
