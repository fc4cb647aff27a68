#include "cli/worker_flags.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/config/flags.h"

namespace tandem::cli {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::UnorderedElementsAre;

const std::map<std::string, FlagNames> kKnown = {
    {"decode", {"--block-size", "--local-prefill-max-tokens", "--role"}},
    {"prefill", {"--block-size", "--enable-prefix-caching", "--no-enable-prefix-caching"}},
};
const std::map<std::string, std::string> kManaged = {{"--role", "use --unified N"}};

TEST(ParseFlagListTest, FindsWhatAFlagSetLists) {
  FlagSet flags("worker", "Works.");
  bool caching = true;
  int size = 16;
  flags.Add("--enable-prefix-caching", &caching, "keeps blocks of --block-size tokens");
  flags.Add("--block-size", &size, "tokens");
  ASSERT_TRUE(flags.Parse({"--list-flags"}).ok());
  ASSERT_TRUE(flags.HelpRequested());
  const auto names = ParseFlagList(flags.Help());
  ASSERT_TRUE(names.ok()) << names.status();
  EXPECT_THAT(*names,
              UnorderedElementsAre("--help", "--config", "--block-size", "--enable-prefix-caching",
                                   "--no-enable-prefix-caching"));
}

TEST(ParseFlagListTest, AnythingElseIsRefused) {
  for (const char* text : {"", "Usage: worker [flags]", "[]", R"({"flags": 1})",
                           R"({"flags": [1]})", R"({"flags": [{"name": "size"}]})"}) {
    EXPECT_FALSE(ParseFlagList(text).ok()) << text;
  }
}

TEST(DistributeFlagsTest, EachProgramGetsWhatItKnows) {
  const auto given = DistributeFlags({"--block-size", "32", "--local-prefill-max-tokens=0",
                                      "--no-enable-prefix-caching", "--block-size=-1"},
                                     kKnown, kManaged, {});
  ASSERT_TRUE(given.ok()) << given.status();
  EXPECT_THAT(given->at("decode"),
              ElementsAre("--block-size", "32", "--local-prefill-max-tokens=0", "--block-size=-1"));
  EXPECT_THAT(given->at("prefill"),
              ElementsAre("--block-size", "32", "--no-enable-prefix-caching", "--block-size=-1"));
}

std::string Error(const std::vector<std::string>& arguments) {
  return std::string(
      DistributeFlags(arguments, kKnown, kManaged, {"--prefill"}).status().message());
}

TEST(DistributeFlagsTest, Mistakes) {
  EXPECT_EQ(Error({"--blok-size=1"}), "unknown flag --blok-size; did you mean --block-size?");
  EXPECT_EQ(Error({"--prefil", "1"}), "unknown flag --prefil; did you mean --prefill?");
  EXPECT_THAT(Error({"--something-else-entirely"}), HasSubstr("--help"));
  EXPECT_THAT(Error({"--role=unified"}), HasSubstr("--unified N"));
  EXPECT_THAT(Error({"stray"}), HasSubstr("'stray'"));
}

}  // namespace
}  // namespace tandem::cli
