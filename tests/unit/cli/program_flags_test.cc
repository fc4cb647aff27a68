#include "cli/program_flags.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/config/flags.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
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
    decode.Add("--step-timeout", &seconds_, "longest step", "s");
    decode.Add("--window", &natural_, "prefills at once");
    decode.AddBytes("--pool", &bytes_, "KV pool");
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
  double seconds_ = 1;
  uint64_t natural_ = 4;
  int64_t bytes_ = 1024;
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
  EXPECT_THAT(Error({"--block-size=much"}),
              HasSubstr("--block-size: 'much' is not a number of tokens"));
  EXPECT_EQ(Error({"--window", "-1"}),
            "--window: '-1' is not accepted; give a non-negative integer");
  EXPECT_EQ(Error({"--step-timeout=1s"}), "--step-timeout: '1s' is not accepted; give a number");
  EXPECT_THAT(Error({"--pool=1 XiB"}), HasSubstr("--pool: '1 XiB' is not a number of bytes"));
  EXPECT_EQ(Error({"--enable-prefix-caching=maybe"}),
            "--enable-prefix-caching: 'maybe' is not accepted; give true or false");
  EXPECT_THAT(given_, IsEmpty());
}

// What a program says of its flags is all that `tandem up` knows of them.
TEST_F(ForeignFlagsTest, TheirKindsAreToldToo) {
  for (const FlagTable& program : programs_) {
    const auto told = ParseTable(TableJson(program));
    ASSERT_OK(told);
    FlagSet flags("tandem up", "Starts a cluster.");
    flags.AddForeign(*told, &given_);
    EXPECT_THAT(std::string(flags.Parse({"--block-size=much"}).message()),
                HasSubstr("'much' is not a number of tokens"));
    EXPECT_OK(flags.Parse({"--block-size=32k"}));
  }
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
