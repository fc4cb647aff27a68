#include "common/text/json.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"

namespace tandem {
namespace {

std::string Python(std::string_view text) {
  auto out = ToPythonJson(text, "x");
  EXPECT_OK(out);
  return out.ok() ? *out : "";
}

std::string Error(std::string_view text) {
  const absl::Status status = ToPythonJson(text, "field").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ParseJson(text, "field").ok(), false);
  return std::string(status.message());
}

TEST(PythonJsonTest, SeparatorsOrderAndDuplicates) {
  EXPECT_EQ(Python(R"({"b":1,"a":[1,2,{}],"b":3,"c":[]})"),
            R"({"b": 3, "a": [1, 2, {}], "c": []})");
  EXPECT_EQ(Python("  null "), "null");
  EXPECT_EQ(Python("[true,false,null]"), "[true, false, null]");
}

// Each pair checked with Python 3.11.
TEST(PythonJsonTest, Numbers) {
  const std::pair<const char*, const char*> cases[] = {
      {"1", "1"},
      {"-0", "0"},
      {"-7", "-7"},
      {"1.0", "1.0"},
      {"-0.0", "-0.0"},
      {"0.1", "0.1"},
      {"1e2", "100.0"},
      {"1E+2", "100.0"},
      {"123456789.125", "123456789.125"},
      {"1e15", "1000000000000000.0"},
      {"1e16", "1e+16"},
      {"1.5e300", "1.5e+300"},
      {"0.0001", "0.0001"},
      {"0.00001", "1e-05"},
      {"1.25e-7", "1.25e-07"},
      {"5e-324", "5e-324"},
      {"18446744073709551615", "18446744073709551615"},
      {"-9223372036854775809", "-9223372036854775809"},
      {"123456789012345678901234567890", "123456789012345678901234567890"},
  };
  for (const auto& [in, out] : cases) EXPECT_EQ(Python(in), out) << in;
}

TEST(PythonJsonTest, Strings) {
  EXPECT_EQ(Python(R"("\u4e2d\ud83d\ude00 <&> \/ \" \\ \b\f\n\r\t\u0001\u007f")"),
            "\"\u4e2d\U0001F600 <&> / \\\" \\\\ \\b\\f\\n\\r\\t\\u0001\x7F\"");
}

TEST(JsonTest, ErrorsSayWhere) {
  EXPECT_THAT(Error("{\"a\":}"), testing::HasSubstr("field: not valid JSON at byte 6"));
  EXPECT_THAT(Error(""), testing::HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("[1,2"), testing::HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("{} x"), testing::HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("[NaN]"), testing::HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("[1e999]"), testing::HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("\"\\ud800\""), testing::HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("\"\xFF\""), testing::HasSubstr("not valid JSON"));
}

TEST(JsonTest, RefusesDeepNesting) {
  const std::string deep(100'000, '[');
  EXPECT_THAT(Error(deep), testing::HasSubstr("nested deeper than 64 at byte 64"));
  EXPECT_OK(ParseJson(std::string(64, '[') + std::string(64, ']'), "x"));
  EXPECT_OK(ParseJson("\"" + std::string(1000, '[') + "\"", "x"));
}

}  // namespace
}  // namespace tandem
