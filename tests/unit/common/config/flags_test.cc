#include "common/config/flags.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace tandem {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

struct Options {
  bool caching = true;
  int block_size = 16;
  uint64_t seed = 0;
  double timeout = 30;
  std::string model;
  int64_t memory = 0;
  std::string dtype = "auto";
};

class FlagsTest : public testing::Test {
 protected:
  FlagsTest() : flags_("tandem_test", "Tests flags.") {
    flags_.Add("--enable-prefix-caching", &options_.caching, "keep finished blocks");
    flags_.Add("--block-size", &options_.block_size, "KV block size", "tokens");
    flags_.Add("--seed", &options_.seed, "random seed");
    flags_.Add("--drain-timeout", &options_.timeout, "time to finish", "s");
    flags_.Add("--model", &options_.model, "checkpoint", "directory");
    flags_.AddBytes("--kv-cache-memory-bytes", &options_.memory, "KV memory");
    flags_.AddChoice("--dtype", &options_.dtype, {"auto", "float32", "bfloat16"}, "element type");
  }
  ~FlagsTest() override {
    if (!config_.empty()) std::remove(config_.c_str());
  }

  std::string Error(const std::vector<std::string>& args) {
    const absl::Status status = flags_.Parse(args);
    return std::string(status.message());
  }
  std::string WriteConfig(const std::string& text) {
    const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
    config_ = testing::TempDir() + "tandem_flags_" + test->name() + ".yaml";
    std::ofstream(config_) << text;
    return config_;
  }

  Options options_;
  FlagSet flags_;
  std::string config_;
};

TEST_F(FlagsTest, ReadsEveryKind) {
  ASSERT_EQ(Error({"--no-enable-prefix-caching", "--block-size", "32",
                   "--seed=18446744073709551615", "--drain-timeout", "0.5", "--model=/a b",
                   "--kv-cache-memory-bytes", "2GiB", "--dtype", "float32"}),
            "");
  EXPECT_FALSE(options_.caching);
  EXPECT_EQ(options_.block_size, 32);
  EXPECT_EQ(options_.seed, UINT64_MAX);
  EXPECT_EQ(options_.timeout, 0.5);
  EXPECT_EQ(options_.model, "/a b");
  EXPECT_EQ(options_.memory, int64_t{2} << 30);
  EXPECT_EQ(options_.dtype, "float32");
}

TEST_F(FlagsTest, BooleanForms) {
  ASSERT_EQ(Error({"--enable-prefix-caching=false"}), "");
  EXPECT_FALSE(options_.caching);
  ASSERT_EQ(Error({"--enable-prefix-caching"}), "");
  EXPECT_TRUE(options_.caching);
  EXPECT_THAT(Error({"--enable-prefix-caching=maybe"}), HasSubstr("maybe"));
}

TEST_F(FlagsTest, LastOneWinsAndValuesMayLookLikeFlags) {
  ASSERT_EQ(Error({"--block-size", "16", "--block-size", "64", "--model", "--odd"}), "");
  EXPECT_EQ(options_.block_size, 64);
  EXPECT_EQ(options_.model, "--odd");
  ASSERT_EQ(Error({"--block-size", "-5", "--model="}), "");
  EXPECT_EQ(options_.block_size, -5);
  EXPECT_EQ(options_.model, "");
}

TEST_F(FlagsTest, UnknownFlagSuggestsTheNearest) {
  EXPECT_EQ(Error({"--blok-size", "16"}), "unknown flag --blok-size; did you mean --block-size?");
  EXPECT_EQ(Error({"--blok-size=16"}), "unknown flag --blok-size; did you mean --block-size?");
  EXPECT_THAT(Error({"--zzzzzzzzzzzz"}), HasSubstr("tandem_test --help"));
  EXPECT_THAT(Error({"stray"}), HasSubstr("unexpected argument 'stray'"));
}

TEST_F(FlagsTest, BadValuesNameFlagAndValue) {
  EXPECT_THAT(Error({"--block-size", "many"}),
              testing::AllOf(HasSubstr("--block-size"), HasSubstr("'many'"), HasSubstr("integer")));
  EXPECT_THAT(Error({"--block-size", "16x"}), HasSubstr("'16x'"));
  EXPECT_THAT(Error({"--block-size", "99999999999"}), HasSubstr("out of range"));
  EXPECT_THAT(Error({"--seed", "-1"}), HasSubstr("--seed"));
  EXPECT_THAT(Error({"--drain-timeout", "nan"}), HasSubstr("finite"));
  EXPECT_THAT(Error({"--kv-cache-memory-bytes", "2XB"}), HasSubstr("2XB"));
  EXPECT_THAT(Error({"--dtype", "float23"}), HasSubstr("did you mean float32?"));
  EXPECT_EQ(Error({"--block-size"}), "--block-size: a value is missing");
}

TEST_F(FlagsTest, YamlHasTheSameNamesAndFlagsWin) {
  const std::string path = WriteConfig(
      "block-size: 64\nkv_cache_memory_bytes: 1GiB\nenable-prefix-caching: false\n"
      "model: \"/m\"\n");
  ASSERT_EQ(Error({"--config", path, "--block-size=128"}), "");
  EXPECT_EQ(options_.block_size, 128);
  EXPECT_EQ(options_.memory, int64_t{1} << 30);
  EXPECT_FALSE(options_.caching);
  EXPECT_EQ(options_.model, "/m");
}

TEST_F(FlagsTest, YamlErrorsNameFileLineAndNearestKey) {
  const std::string path = WriteConfig("seed: 1\nblock_sise: 64\n");
  EXPECT_THAT(Error({"--config", path}),
              testing::AllOf(HasSubstr(path), HasSubstr("line 2"), HasSubstr("--block-size")));
  WriteConfig("block-size: lots\n");
  EXPECT_THAT(Error({"--config", path}), HasSubstr("'lots'"));
  WriteConfig("block-size: [1, 2]\n");
  EXPECT_THAT(Error({"--config", path}), HasSubstr("one value"));
  WriteConfig("block-size: 16\nblock_size: 32\n");
  EXPECT_THAT(Error({"--config", path}), HasSubstr("twice"));
  WriteConfig("- 1\n");
  EXPECT_THAT(Error({"--config", path}), HasSubstr("map"));
  WriteConfig("seed: 1\na: {b\n");
  EXPECT_THAT(Error({"--config", path}), AllOf(HasSubstr(path), HasSubstr("line 3")));
  WriteConfig("");
  EXPECT_EQ(Error({"--config", path}), "");
  EXPECT_THAT(Error({"--config", "/nowhere.yaml"}), HasSubstr("/nowhere.yaml"));
}

TEST_F(FlagsTest, HelpListsFlagUnitAndDefault) {
  ASSERT_EQ(Error({"--help"}), "");
  EXPECT_TRUE(flags_.HelpRequested());
  const std::string help = flags_.Help();
  EXPECT_THAT(help, HasSubstr("KV block size (tokens; default 16)"));
  EXPECT_THAT(help, HasSubstr("--[no-]enable-prefix-caching"));
  EXPECT_THAT(help, HasSubstr("auto, float32, bfloat16"));
  EXPECT_THAT(help, HasSubstr("--config"));
}

TEST_F(FlagsTest, HelpAlsoByItsShortName) {
  ASSERT_EQ(Error({"-h"}), "");
  EXPECT_TRUE(flags_.HelpRequested());
  EXPECT_THAT(flags_.Help(), HasSubstr("-h, --help"));
}

TEST_F(FlagsTest, HelpFitsEightyColumns) {
  flags_.Group("Speed");
  bool invariant = false;
  flags_.Add("--a-flag-whose-name-alone-takes-half-a-line", &invariant,
             "the same tokens whatever else is in the batch and however a prompt is cut into parts "
             "that are computed one after the other");
  ASSERT_EQ(Error({"--help"}), "");
  std::istringstream help(flags_.Help());
  size_t longest = 0;
  for (std::string line; std::getline(help, line);) longest = std::max(longest, line.size());
  EXPECT_LE(longest, 80u) << flags_.Help();
  EXPECT_GE(longest, 70u) << flags_.Help();
}

TEST_F(FlagsTest, HelpOfOneGroupOrOfAWord) {
  flags_.Group("Network");
  int port = 0;
  flags_.Add("--port", &port, "where to listen");
  ASSERT_EQ(Error({"--help=network"}), "");
  EXPECT_THAT(flags_.Help(), AllOf(HasSubstr("--port"), Not(HasSubstr("--seed"))));
  ASSERT_EQ(Error({"--help=cache"}), "");
  EXPECT_THAT(flags_.Help(), AllOf(HasSubstr("--kv-cache-memory-bytes"), Not(HasSubstr("--port"))));
  ASSERT_EQ(Error({"--help=nonsense"}), "");
  EXPECT_THAT(flags_.Help(), HasSubstr("Network"));
}

TEST_F(FlagsTest, TokensAsPeopleWriteThem) {
  std::optional<uint64_t> most;
  flags_.Add("--max-tokens", &most, "tokens to generate", "tokens");
  ASSERT_EQ(Error({"--block-size=2k", "--max-tokens", "128K"}), "");
  EXPECT_EQ(options_.block_size, 2000);
  EXPECT_EQ(most, 131072u);
  ASSERT_EQ(Error({"--max-tokens", "1.5k"}), "");
  EXPECT_EQ(most, 1500u);
  EXPECT_THAT(Error({"--block-size=32x"}), HasSubstr("32k"));
  EXPECT_THAT(Error({"--block-size=9g"}), HasSubstr("out of range"));
  EXPECT_THAT(Error({"--block-size=0.0001k"}), HasSubstr("not a number of tokens"));
  EXPECT_THAT(Error({"--seed=1k"}), HasSubstr("'1k'"));  // no tokens
}

// A variable of the environment for as long as the test.
struct Variable {
  Variable(std::string name, const std::string& value) : name(std::move(name)) {
    setenv(this->name.c_str(), value.c_str(), 1);
  }
  ~Variable() { unsetenv(name.c_str()); }
  const std::string name;
};

TEST_F(FlagsTest, FlagBeforeEnvironmentBeforeFileBeforeDefault) {
  const std::string path = WriteConfig("block-size: 64\nseed: 64\nmodel: file\n");
  const Variable size("TANDEM_BLOCK_SIZE", "32");
  const Variable seed("TANDEM_SEED", "32");
  const Variable empty("TANDEM_MODEL", "");
  ASSERT_EQ(Error({"--config", path, "--block-size=16"}), "");
  EXPECT_EQ(options_.block_size, 16);
  EXPECT_EQ(options_.seed, 32u);
  EXPECT_EQ(options_.model, "file");
  EXPECT_EQ(options_.timeout, 30);
}

TEST_F(FlagsTest, ABadVariableIsNamed) {
  const Variable size("TANDEM_BLOCK_SIZE", "tcp://10.0.0.1:80");
  EXPECT_THAT(Error({}), AllOf(HasSubstr("TANDEM_BLOCK_SIZE"), HasSubstr("--block-size"),
                               HasSubstr("tcp://10.0.0.1:80")));
  EXPECT_EQ(Error({"--help"}), "");
}

TEST(FlagsEnvironmentTest, CommandsThatMeanOtherThingsHaveOtherVariables) {
  std::string model = "default";
  std::string server;
  FlagSet flags("tandem chat", "Talks.");
  flags.Add("--model", &model, "served name");
  flags.Add("--server", &server, "address");
  flags.SetEnvironment("--server", "TANDEM_SERVER");
  const Variable directory("TANDEM_MODEL", "/models/a");
  const Variable name("TANDEM_CHAT_MODEL", "a");
  const Variable address("TANDEM_SERVER", "host:1");
  ASSERT_TRUE(flags.Parse(std::vector<std::string>{}).ok());
  EXPECT_EQ(model, "a");
  EXPECT_EQ(server, "host:1");
}

TEST_F(FlagsTest, FlagsOfOtherServersSayWhatToDoInstead) {
  EXPECT_THAT(Error({"--pipeline-parallel-size", "2"}),
              AllOf(HasSubstr("--pipeline-parallel-size"), HasSubstr("--prefill N")));
  EXPECT_THAT(Error({"--model-id=x"}), HasSubstr("--model DIR"));
  const std::string path = WriteConfig("max_total_tokens: 4096\n");
  EXPECT_THAT(Error({"--config", path}), AllOf(HasSubstr("line 1"), HasSubstr("--max-model-len")));
}

TEST_F(FlagsTest, AnswersVersionWhereItHasOne) {
  EXPECT_THAT(Error({"--version"}), HasSubstr("unknown flag --version"));
  flags_.AnswerVersion("tandem_test 1.2.3\n");
  ASSERT_EQ(Error({"--version"}), "");
  ASSERT_TRUE(flags_.HelpRequested());
  EXPECT_EQ(flags_.Help(), "tandem_test 1.2.3\n");
}

TEST(FlagsOptionalTest, UnsetUnlessGivenAndRepeatable) {
  std::optional<double> temperature;
  std::optional<uint64_t> seed;
  std::optional<int64_t> top_k;
  std::vector<std::string> stop;
  FlagSet flags("tandem generate", "Continues a prompt.");
  flags.Add("--temperature", &temperature, "0 is greedy");
  flags.Add("--seed", &seed, "random seed");
  flags.Add("--top-k", &top_k, "candidates");
  flags.AddRepeated("--stop", &stop, "text to end before");
  ASSERT_TRUE(flags.Parse(std::vector<std::string>{}).ok());
  EXPECT_EQ(temperature, std::nullopt);
  ASSERT_TRUE(flags
                  .Parse(std::vector<std::string>{"--temperature=0.5", "--top-k", "-1", "--stop",
                                                  "a", "--stop", "b c"})
                  .ok());
  EXPECT_EQ(temperature, 0.5);
  EXPECT_EQ(top_k, -1);
  EXPECT_EQ(seed, std::nullopt);
  EXPECT_THAT(stop, ElementsAre("a", "b c"));
  EXPECT_FALSE(flags.Parse(std::vector<std::string>{"--seed=-1"}).ok());
}

TEST(FlagsListTest, TakesSeveralValuesUpToTheNextFlag) {
  std::vector<std::string> goodput;
  uint64_t seed = 0;
  FlagSet flags("tandem bench", "Measures.");
  flags.AddList("--goodput", &goodput, "limits", "ms");
  flags.Add("--seed", &seed, "random seed");
  ASSERT_TRUE(flags
                  .Parse(std::vector<std::string>{"--goodput", "ttft:500", "tpot:50", "--seed", "3",
                                                  "--goodput=e2el:9"})
                  .ok());
  EXPECT_THAT(goodput, ElementsAre("ttft:500", "tpot:50", "e2el:9"));
  EXPECT_EQ(seed, 3u);
  EXPECT_FALSE(flags.Parse(std::vector<std::string>{"--seed", "3", "4"}).ok());
}

TEST(FlagsPositionalTest, RequiredAndOptional) {
  std::string dir;
  std::string extra = "none";
  FlagSet flags("tandem inspect", "Says what a model needs.");
  flags.AddPositional("MODEL_DIR", &dir, "checkpoint directory", true);
  flags.AddPositional("EXTRA", &extra, "more", false);
  EXPECT_THAT(std::string(flags.Parse(std::vector<std::string>{}).message()),
              HasSubstr("MODEL_DIR is missing"));
  ASSERT_TRUE(flags.Parse(std::vector<std::string>{"/model"}).ok());
  EXPECT_EQ(dir, "/model");
  EXPECT_EQ(extra, "none");
  ASSERT_TRUE(flags.Parse(std::vector<std::string>{"/model", "x"}).ok());
  EXPECT_EQ(extra, "x");
  EXPECT_FALSE(flags.Parse(std::vector<std::string>{"/model", "x", "y"}).ok());
  EXPECT_TRUE(flags.Parse(std::vector<std::string>{"--help"}).ok());
  EXPECT_THAT(flags.Names(), ElementsAre("--help", "--config"));
}

TEST_F(FlagsTest, ListFlagsAnswersInJsonAndStaysOutOfTheHelp) {
  flags_.AddPositional("PATH", &options_.model, "where", true);
  EXPECT_EQ(flags_.Help().find("--list-flags"), std::string::npos);
  EXPECT_THAT(Error({"--list-flagz"}), testing::Not(HasSubstr("--list-flags?")));
  ASSERT_EQ(Error({"--list-flags"}), "");  // the positional may be missing, as with --help
  ASSERT_TRUE(flags_.HelpRequested());
  const auto list = nlohmann::json::parse(flags_.Help());
  EXPECT_EQ(list["program"], "tandem_test");
  const nlohmann::json block_size = {{"name", "--block-size"},
                                     {"group", ""},
                                     {"unit", "tokens"},
                                     {"default", "16"},
                                     {"environment", "TANDEM_BLOCK_SIZE"},
                                     {"help", "KV block size"},
                                     {"choices", nlohmann::json::array()},
                                     {"kind", "integer"},
                                     {"boolean", false},
                                     {"required", false},
                                     {"foreign", false}};
  EXPECT_THAT(list["flags"], testing::Contains(block_size));
}

TEST(FlagTableTest, AnythingElseIsRefused) {
  for (const char* text :
       {"", "Usage: worker [flags]", "[]", R"({"flags": 1})", R"({"program": "a", "flags": [1]})",
        R"({"program": "a", "flags": [{"name": "size"}]})"}) {
    EXPECT_FALSE(ParseTable(text).ok()) << text;
  }
}

}  // namespace
}  // namespace tandem
