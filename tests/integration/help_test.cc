// Help, versions, completion, variables and names of flags, as a user meets them.
#include <csignal>
#include <filesystem>
#include <sstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

using testing::AllOf;
using testing::HasSubstr;

const std::vector<std::string> kCommands = {"up",      "chat",       "generate", "bench", "report",
                                            "plan",    "status",     "health",   "drain", "doctor",
                                            "inspect", "completion", "version"};
const std::vector<std::string> kServers = {"tandem_router", "tandem_prefill_worker",
                                           "tandem_decode_worker"};

// Every command and every server, up to its flags.
std::vector<std::vector<std::string>> Programs() {
  std::vector<std::vector<std::string>> out;
  for (const std::string& command : kCommands) out.push_back({BinaryPath("tandem"), command});
  for (const std::string& server : kServers) out.push_back({BinaryPath(server)});
  return out;
}

Completed RunWith(std::vector<std::string> arguments, const std::vector<std::string>& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return RunCommand(arguments, 60);
}

TEST(Help, ShortNameWorksEverywhereAndFitsEightyColumns) {
  for (const auto& program : Programs()) {
    const Completed help = RunWith(program, {"-h"});
    EXPECT_EQ(help.exit_code, 0) << help.err;
    EXPECT_THAT(help.out, HasSubstr("Usage: ")) << testing::PrintToString(program);
    std::istringstream lines(help.out);
    for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 80u) << line;
  }
}

TEST(Help, UpShowsTheWorkersFlagsWhenAsked) {
  const Completed own = RunCommand({BinaryPath("tandem"), "up", "--help"}, 60);
  EXPECT_THAT(own.out, AllOf(HasSubstr("--help=all"), Not(HasSubstr("--prefill-window"))));
  const Completed all = RunCommand({BinaryPath("tandem"), "up", "--help=all"}, 60);
  EXPECT_THAT(all.out, AllOf(HasSubstr("--max-num-seqs"), HasSubstr("--max-queued-requests"),
                             HasSubstr("--prefill-window")));
  const Completed served = RunCommand({BinaryPath("tandem"), "serve", "--help"}, 60);
  EXPECT_EQ(served.out, own.out);
}

TEST(Version, OfEveryServerAndOfTheCommand) {
  for (const std::string& server : kServers) {
    const Completed version = RunCommand({BinaryPath(server), "--version"}, 60);
    EXPECT_EQ(version.exit_code, 0) << version.err;
    EXPECT_THAT(version.out, AllOf(HasSubstr(server + " "), HasSubstr("commit ")));
  }
  const Completed text = RunCommand({BinaryPath("tandem"), "version"}, 60);
  EXPECT_THAT(text.out, AllOf(HasSubstr("commit "), HasSubstr("CPU"), HasSubstr("CUDA")));
  const Completed json = RunCommand({BinaryPath("tandem"), "version", "--json"}, 60);
  const auto fields = nlohmann::json::parse(json.out);
  for (const char* name : {"version", "commit", "build_type", "cuda", "cpu_features", "gpus"}) {
    EXPECT_TRUE(fields.contains(name)) << name;
  }
}

// What bash offers for the words so far.
std::string Offered(const std::string& words, int current) {
  const std::string bin = std::filesystem::path(BinaryPath("tandem")).parent_path().string();
  const std::string script =
      "PATH=" + bin + ":$PATH; source <(tandem completion bash); COMP_WORDS=(" + words +
      "); COMP_CWORD=" + std::to_string(current) + "; _tandem; printf '%s\n' \"${COMPREPLY[@]}\"";
  const Completed completed = RunCommand({"/bin/bash", "-c", script}, 60);
  EXPECT_EQ(completed.exit_code, 0) << completed.err;
  return completed.out;
}

TEST(Completion, BashOffersCommandsFlagsAndValues) {
  EXPECT_EQ(Offered("tandem gen", 1), "generate\n");
  EXPECT_EQ(Offered("tandem up --prefi", 2), "--prefill\n--prefill-window\n--prefill-timeout\n");
  EXPECT_EQ(Offered("tandem serve --dtype b", 3), "bfloat16\n");
  EXPECT_EQ(Offered("tandem_decode_worker --role = u", 3), "unified\n");
  EXPECT_THAT(Offered("tandem chat --no", 2), HasSubstr("--no-json\n"));
}

TEST(Completion, ZshGetsEveryCommand) {
  const Completed zsh = RunCommand({BinaryPath("tandem"), "completion", "zsh"}, 60);
  EXPECT_THAT(zsh.out, HasSubstr("#compdef tandem tandem_router"));
  for (const std::string& command : kCommands) EXPECT_THAT(zsh.out, HasSubstr(command + ") _arg"));
  const Completed fish = RunCommand({BinaryPath("tandem"), "completion", "fish"}, 60);
  EXPECT_EQ(fish.exit_code, 2);
  EXPECT_THAT(fish.err, HasSubstr("bash or zsh"));
}

void ExpectUpRefuses(const std::vector<std::string>& arguments, const std::string& message) {
  const Completed up = RunWith({BinaryPath("tandem"), "up"}, arguments);
  EXPECT_EQ(up.exit_code, 2) << up.err;
  EXPECT_THAT(up.err, HasSubstr(message));
}

TEST(Up, MistakesEndItBeforeAnythingStarts) {
  const std::string model = SourcePath("models/demo");
  ExpectUpRefuses({}, "the model is missing");
  ExpectUpRefuses({model, "--pipeline-parallel-size", "2"}, "--prefill N");
  ExpectUpRefuses({model, "--model-id", "x"}, "--model DIR");
  ExpectUpRefuses({model, "--listen", "0.0.0.0:1"}, "use --host and --port");
  ExpectUpRefuses({model, "--prefill=some"}, "--prefill");
}

TEST(Up, VariablesThatItSetsItselfAreNamed) {
  const Completed up = RunCommand({"/usr/bin/env", "TANDEM_KV_LISTEN=0.0.0.0:1",
                                   BinaryPath("tandem"), "up", SourcePath("models/demo")},
                                  60);
  EXPECT_EQ(up.exit_code, 2);
  EXPECT_THAT(up.err, AllOf(HasSubstr("TANDEM_KV_LISTEN"), HasSubstr("set by tandem up itself")));
}

TEST(Dtype, HasTheSameNamesEverywhere) {
  const std::string model = SourcePath("models/demo");
  std::vector<std::vector<std::string>> programs = {{BinaryPath("tandem"), "up", model},
                                                    {BinaryPath("tandem"), "inspect", model}};
  for (const std::string& server : kServers)
    programs.push_back({BinaryPath(server), "--model", model});
  for (const auto& program : programs) {
    const Completed refused = RunWith(program, {"--dtype", "float16"});
    EXPECT_EQ(refused.exit_code, 2) << testing::PrintToString(program);
    EXPECT_THAT(refused.err, HasSubstr("auto, bfloat16, float32"));
  }
}

TEST(Up, SecretsOfTheEnvironmentStayOutOfTheHelp) {
  for (const std::string& server : kServers) {
    const Completed help = RunCommand(
        {"/usr/bin/env", "TANDEM_CLUSTER_SECRET=hush-hush", BinaryPath(server), "-h"}, 60);
    EXPECT_EQ(help.exit_code, 0) << help.err;
    EXPECT_THAT(help.out, Not(HasSubstr("hush-hush")));
  }
}

TEST(Up, FindsAModelOfTheHuggingFaceCacheAndItsName) {
  TempDir cache;
  const std::string folder = cache.path() + "/models--Tandem--demo";
  std::filesystem::create_directories(folder + "/snapshots");
  std::filesystem::copy(SourcePath("models/demo"), folder + "/snapshots/0123abc");
  auto up = Process::Spawn({BinaryPath("tandem"), "serve", folder, "--unified", "1", "--port", "0",
                            "--kv-cache-memory-bytes", "64MiB", "--max-model-len", "1k"},
                           {}, cache.path() + "/stderr");
  const auto ready = up->ReadLine(60);
  ASSERT_TRUE(ready.has_value() && ready->starts_with("ready "))
      << ReadWholeFile(cache.path() + "/stderr");
  const Completed status =
      RunCommand({BinaryPath("tandem"), "status", "--json", "--server", ready->substr(6)}, 60);
  EXPECT_EQ(status.exit_code, 0) << status.err;
  EXPECT_THAT(status.out, AllOf(HasSubstr("\"Tandem/demo\""), HasSubstr("\"max_model_len\":1000")));
  up->Signal(SIGTERM);
  EXPECT_EQ(up->Wait(40), 0);
}

}  // namespace
}  // namespace tandem
