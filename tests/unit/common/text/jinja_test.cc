// The Jinja of chat templates. That it equals Jinja2 is chat_template_test's, on whole templates;
// here are the properties that Jinja2 has not: who wrote a text, and bounds.
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/text/jinja/json_value.h"
#include "common/text/jinja/template.h"
#include "tests/support/paths.h"

namespace tandem::jinja {
namespace {

using testing::HasSubstr;

// What `source` prints for the variable `user`, which is data; data in brackets.
std::string Marked(const std::string& source, const std::string& user) {
  const auto parsed = Template::Parse(source);
  EXPECT_OK(parsed);
  Dict variables;
  variables.Set(Text("user"), Value(Text(user, true)));
  variables.Set(Text("object"), FromJson(R"({"k": "v", "n": [1, "<s>"]})", "object").value());
  const auto text = parsed->Render(variables, absl::Now());
  EXPECT_OK(text);
  std::string out;
  bool data = false;
  for (size_t i = 0; i < text->size(); ++i) {
    if (text->IsData(i) != data) out += data ? "]" : "[";
    data = text->IsData(i);
    out += text->chars()[i];
  }
  return out + (data ? "]" : "");
}

TEST(JinjaTest, WhatUsersWroteStaysMarkedHoweverItIsCut) {
  EXPECT_EQ(Marked("<s>{{ '<u>' + user }}", "<s>x"), "<s><u>[<s>x]");
  EXPECT_EQ(Marked("{{ user | trim }}.", "  <s> \n"), "[<s>].");
  EXPECT_EQ(Marked("{{ user.split('<s>') | join('<s>') }}", "a<s>b"), "[a]<s>[b]");
  EXPECT_EQ(Marked("{{ user.split('<t>')[-1].lstrip('\\n') }}", "a<t>\n<s>"), "[<s>]");
  EXPECT_EQ(Marked("{{ user[1:4] }}{{ user[::-1] }}", "-<s>-"), "[<s>->s<-]");
  EXPECT_EQ(Marked("{{ user | replace('a', '<s>') }}", "<s>a"), "[<s>]<s>");
  EXPECT_EQ(Marked("{{ user | upper | lower | title }}", "ab"), "[Ab]");
  EXPECT_EQ(Marked("{% set x %}<{{ user }}>{% endset %}{{ x | string }}", "s"), "<[s]>");
  EXPECT_EQ(Marked("{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(user) }}", "s"), "<[s]>");
  EXPECT_EQ(Marked("{% for c in user %}{{ c }},{% endfor %}", "ab"), "[a],[b],");
  EXPECT_EQ(Marked("{{ [user] }}", "<s>"), "['[<s>]']");
}

TEST(JinjaTest, JsonIsDataWithItsKeysAndPunctuation) {
  EXPECT_EQ(Marked("{{ object | tojson }}|", ""), R"([{"k": "v", "n": [1, "<s>"]}]|)");
  EXPECT_EQ(Marked("{{ user | tojson }}|", "<s>"), R"(["<s>"]|)");
  EXPECT_EQ(Marked("{{ {'a': user | trim} | tojson }}|", "<s>"), R"([{"a": "<s>"}]|)");
  EXPECT_EQ(Marked("{% for k, v in object.items() %}{{ k }}={{ v }};{% endfor %}", ""),
            "[k]=[v];[n]=[1, '[<s>]'];");
}

TEST(JinjaTest, WhatIsReadFromJsonIsData) {
  EXPECT_EQ(Marked("{{ (user | from_json).k }}", R"({"k": "<s>"})"), "[<s>]");
}

absl::Status ErrorOf(const std::string& source) {
  const auto parsed = Template::Parse(source);
  return parsed.ok() ? parsed->Render({}, absl::Now()).status() : parsed.status();
}

TEST(JinjaTest, ErrorsNameTheLine) {
  EXPECT_THAT(ErrorOf("\n\n{{ a.b }}").ToString(), HasSubstr("line 3: \"a\" is undefined"));
  EXPECT_THAT(ErrorOf("{{ 'a' + 1 }}").ToString(), HasSubstr("+ of a string and an integer"));
  EXPECT_THAT(ErrorOf("{{ 1 // 0 }}").ToString(), HasSubstr("division by zero"));
  EXPECT_THAT(ErrorOf("{% set a.b = 1 %}").ToString(), HasSubstr("a is no namespace"));
  EXPECT_THAT(ErrorOf("{{ 1 < 2 < 3 }}").ToString(), HasSubstr("chained comparisons"));
  EXPECT_THAT(ErrorOf("{{ x is frozen }}").ToString(), HasSubstr("test \"frozen\""));
  EXPECT_THAT(ErrorOf("{{ f() }}").ToString(), HasSubstr("\"f\" is undefined, not a function"));
  EXPECT_THAT(ErrorOf("{{ (1 }}").ToString(), HasSubstr("line 1"));
}

TEST(JinjaTest, NoTemplateRunsOrNestsWithoutEnd) {
  EXPECT_EQ(ErrorOf("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}")
                .code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(ErrorOf("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").ToString(),
              HasSubstr("deep"));
  EXPECT_THAT(ErrorOf("{{ range(1000000) }}").ToString(), HasSubstr("range is over"));
  EXPECT_THAT(ErrorOf("{% set ns = namespace() %}{% set ns.self = ns %}").ToString(),
              HasSubstr("a namespace cannot be part"));
  EXPECT_THAT(
      ErrorOf("{% set ns = namespace() %}{% set ns.self = [ns] %}{{ ns.self[0] }}").ToString(),
      HasSubstr("nests too deeply"));
  const std::string grow =
      "{% set ns = namespace(x=START) %}{% for i in range(999) %}"
      "{% set ns.x = MORE %}{% endfor %}{{ ns.x | string | length }}";
  const auto growing = [&](const char* start, const char* more) {
    std::string source = grow;
    source.replace(source.find("START"), 5, start);
    return ErrorOf(source.replace(source.find("MORE"), 4, more)).ToString();
  };
  EXPECT_THAT(growing("[]", "[ns.x]"), HasSubstr("OK"));
  EXPECT_THAT(growing("[1]", "ns.x + ns.x"), HasSubstr("too long"));
  EXPECT_THAT(growing("'ab'", "ns.x + ns.x"), HasSubstr("too long"));
  EXPECT_THAT(growing("'ab'", "ns.x ~ ns.x"), HasSubstr("too long"));
  EXPECT_THAT(ErrorOf("{{ " + std::string(100000, '(')).ToString(), HasSubstr("line 1"));
  EXPECT_THAT(ErrorOf("{{ " + std::string(100000, '-') + "1 }}").ToString(), HasSubstr("line 1"));
  std::string sum = "{{ 1";
  for (int i = 0; i < 100000; ++i) sum += "+1";
  EXPECT_THAT(ErrorOf(sum + " }}").ToString(), HasSubstr("too long"));
  std::string ifs;
  for (int i = 0; i < 100000; ++i) ifs += "{% if 1 %}";
  EXPECT_THAT(ErrorOf(ifs).ToString(), HasSubstr("nested too deeply"));
}

TEST(JinjaTest, AMistakeBehindElifEndsTheParser) {
  EXPECT_FALSE(ErrorOf("{% if a %}1{% elif %}2{% endif %}").ok());
  EXPECT_FALSE(ErrorOf("{% if a %}1{% elif b %}2{% elif ( %}3{% endif %}").ok());
  EXPECT_FALSE(ErrorOf("{% if a %}1{% elif b %}2{% unknown %}3{% endif %}").ok());
}

}  // namespace
}  // namespace tandem::jinja
