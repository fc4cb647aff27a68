#include "cli/program_flags.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/config/flags.h"

namespace tandem::cli {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;
using testing::UnorderedElementsAre;

// As `tandem up` meets them: its own flags and those of two programs.
class ForeignFlagsTest : public testing::Test {
 protected:
  ForeignFlagsTest() {
    FlagSet decode("decode", "Streams.");
    decode.Group("Memory");
    decode.Add("--block-size", &number_, "block size", "tokens");
    decode.Add("--role", &text_, "what to do");
    FlagSet prefill("prefill", "Computes.");
    prefill.Group("Memory");
    prefill.Add("--block-size", &number_, "block size", "tokens");
    prefill.Add("--enable-prefix-caching", &truth_, "keep blocks");
    programs_ = {decode.Table(), prefill.Table()};
    flags_.AddPositional("MODEL_DIR", &model_, "checkpoint", false);
    flags_.Add("--port", &port_, "where to listen");
    for (const FlagTable& program : programs_) flags_.AddForeign(program, &given_);
    flags_.Refuse("--role", "is set by tandem up itself; use --unified N");
  }

  std::string Error(const std::vector<std::string>& arguments) {
    return std::string(flags_.Parse(arguments).message());
  }

  int number_ = 16;
  int port_ = 8000;
  bool truth_ = true;
  std::string text_, model_;
  std::vector<std::string> given_;
  std::vector<FlagTable> programs_;
  FlagSet flags_{"tandem up", "Starts a cluster."};
};

TEST_F(ForeignFlagsTest, EachProgramGetsWhatItKnows) {
  ASSERT_EQ(Error({"--block-size", "-1", "--no-enable-prefix-caching", "--port=1"}), "");
  const auto given = DistributeFlags(given_, programs_);
  EXPECT_THAT(given.at("decode"), ElementsAre("--block-size=-1"));
  EXPECT_THAT(given.at("prefill"),
              UnorderedElementsAre("--block-size=-1", "--enable-prefix-caching=false"));
}

TEST_F(ForeignFlagsTest, ThePositionalArgumentMayStandAnywhere) {
  ASSERT_EQ(Error({"--block-size", "32", "/model", "--enable-prefix-caching"}), "");
  EXPECT_EQ(model_, "/model");
  EXPECT_THAT(given_, UnorderedElementsAre("--block-size=32", "--enable-prefix-caching=true"));
}

TEST_F(ForeignFlagsTest, MistakesAreFoundBeforeAnythingStarts) {
  EXPECT_EQ(Error({"--blok-size=1"}), "unknown flag --blok-size; did you mean --block-size?");
  EXPECT_EQ(Error({"--prt", "1"}), "unknown flag --prt; did you mean --port?");
  EXPECT_THAT(Error({"--role=unified"}), HasSubstr("--unified N"));
  EXPECT_THAT(Error({"model", "stray"}), HasSubstr("'stray'"));
}

TEST_F(ForeignFlagsTest, HelpShowsThemWhereAsked) {
  ASSERT_EQ(Error({"-h"}), "");
  EXPECT_THAT(flags_.Help(), AllOf(HasSubstr("--port"), HasSubstr("--help=all"),
                                   HasSubstr("Memory"), Not(HasSubstr("--block-size"))));
  ASSERT_EQ(Error({"--help=all"}), "");
  EXPECT_THAT(flags_.Help(),
              AllOf(HasSubstr("--port"), HasSubstr("--block-size"), Not(HasSubstr("--role"))));
  ASSERT_EQ(Error({"--help=memory"}), "");
  EXPECT_THAT(flags_.Help(), AllOf(HasSubstr("--block-size"), Not(HasSubstr("--port"))));
}

TEST(AskForFlagsTest, WhatIsNoProgramOfOursIsAnError) {
  EXPECT_FALSE(AskForFlags({{"/no/such/program"}}).ok());
  EXPECT_THAT(std::string(AskForFlags({{"/bin/false"}}).status().message()),
              HasSubstr("exit code 1"));
  EXPECT_THAT(std::string(AskForFlags({{"/bin/echo"}}).status().message()),
              HasSubstr("not a list of flags"));
}

}  // namespace
}  // namespace tandem::cli
