// The programs as a user types them: the `tandem` command, mistakes included.
#include <arpa/inet.h>
#include <filesystem>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// `tandem up` with its address; stopped by the destructor if the test did not.
struct Up {
  std::unique_ptr<Process> process;
  std::string address;

  explicit Up(std::vector<std::string> more = {}) {
    std::vector<std::string> args = {BinaryPath("tandem"),
                                     "up",
                                     "--model",
                                     SourcePath("models/demo"),
                                     "--prefill",
                                     "1",
                                     "--decode",
                                     "1",
                                     "--port",
                                     "0",
                                     "--kv-cache-memory-bytes",
                                     "64MiB"};
    args.insert(args.end(), more.begin(), more.end());
    process = Process::Spawn(args, {}, dir.path() + "/stderr");
    const auto line = process->ReadLine(60);
    EXPECT_TRUE(line.has_value() && line->starts_with("ready "))
        << line.value_or("(nothing)") << Logs();
    if (line.has_value() && line->size() > 6) address = line->substr(6);
  }
  std::string Logs() const { return ReadWholeFile(dir.path() + "/stderr"); }
  TempDir dir;
};

class Stops : public testing::TestWithParam<int> {};

TEST_P(Stops, CleanlyOnSignal) {
  Up up;
  const Completed answer = RunCommand({BinaryPath("tandem"), "generate", "--server", up.address,
                                       "--prompt", "hello", "--max-tokens", "4"},
                                      60);
  EXPECT_EQ(answer.exit_code, 0) << answer.err;
  const Completed status = RunCommand({BinaryPath("tandem"), "status", "--server", up.address}, 30);
  EXPECT_EQ(status.exit_code, 0) << status.err;
  EXPECT_THAT(status.out, AllOf(HasSubstr("prefill-0"), HasSubstr("decode-0")));
  up.process->Signal(GetParam());
  EXPECT_EQ(up.process->Wait(40), 0) << up.Logs();
  const Completed gone = RunCommand({BinaryPath("tandem"), "status", "--server", up.address}, 30);
  EXPECT_EQ(gone.exit_code, 1);
  EXPECT_THAT(gone.err, HasSubstr(up.address));
}

INSTANTIATE_TEST_SUITE_P(Signals, Stops, testing::Values(SIGINT, SIGTERM));

// The first of `count` ports in a row that are free, below those that the system gives to others.
int FreePorts(int count) {
  for (int base = 20'000 + getpid() % 10'000;; base += count) {
    bool free = true;
    for (int i = 0; i < count && free; ++i) {
      const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      sockaddr_in address{};
      address.sin_family = AF_INET;
      address.sin_port = htons(static_cast<uint16_t>(base + i));
      address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      free = bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
      close(fd);
    }
    if (free) return base;
  }
}

std::string ScrapePort(int port) {
  Member member;
  member.metrics_address = "127.0.0.1:" + std::to_string(port);
  return TestCluster::Scrape(member);
}

TEST(CommandLine, MetricsPortsOutliveRestarts) {
  TempDir dir;
  const std::string targets = dir.path() + "/targets.json";
  const int base = FreePorts(3);
  Up up({"--metrics-port", std::to_string(base), "--metrics-sd-file", targets});
  const char* const roles[] = {"router", "prefill", "decode"};
  for (int i = 0; i < 3; ++i) {
    EXPECT_THAT(ScrapePort(base + i),
                HasSubstr("tandem_build_info{model_name=\"demo\",role=\"" + std::string(roles[i])));
  }
  const std::string told = ReadWholeFile(targets);
  for (int i = 0; i < 3; ++i) EXPECT_THAT(told, HasSubstr(":" + std::to_string(base + i) + "\""));

  const auto process_id = [&](int port) {
    const std::string page = ScrapePort(port);
    const size_t at = page.find("process_start_time_seconds{");
    return at == page.npos ? "" : page.substr(at, page.find('\n', at) - at);
  };
  const std::string before = process_id(base + 2);
  ASSERT_NE(before, "");
  const Completed drained = RunCommand(
      {BinaryPath("tandem"), "drain", "decode-0", "--force", "--server", up.address}, 60);
  ASSERT_EQ(drained.exit_code, 0) << drained.err;
  std::string after;
  for (int i = 0; i < 1500 && (after.empty() || after == before); ++i) {
    SleepMilliseconds(20);
    after = process_id(base + 2);
  }
  EXPECT_NE(after, "");
  EXPECT_NE(after, before) << up.Logs();
}

TEST(CommandLine, ChatStreamsAConversation) {
  Up up;
  const Completed chat = RunCommand({BinaryPath("tandem"), "chat", "--server", up.address}, 60,
                                    "My name is Ada and I live in Hefei.\nWhat is my name?\n");
  EXPECT_EQ(chat.exit_code, 0) << chat.err;
  EXPECT_THAT(chat.out, HasSubstr("Ada"));
}

TEST(CommandLine, InspectTellsWhatAModelCosts) {
  const Completed inspect =
      RunCommand({BinaryPath("tandem"), "inspect", SourcePath("models/demo")}, 20);
  EXPECT_EQ(inspect.exit_code, 0) << inspect.err;
  EXPECT_THAT(inspect.out, HasSubstr("Qwen2ForCausalLM"));
}

TEST(CommandLine, WorkerThatDiesIsRestarted) {
  Up up;
  const Completed before = RunCommand(
      {"pgrep", "-P", std::to_string(up.process->pid()), "-f", "tandem_decode_worker"}, 10);
  ASSERT_EQ(before.exit_code, 0);
  kill(std::stoi(before.out), SIGKILL);
  bool served = false;
  for (int i = 0; i < 100 && !served; ++i) {
    served = RunCommand({BinaryPath("tandem"), "generate", "--server", up.address, "--prompt", "hi",
                         "--max-tokens", "2"},
                        30)
                 .exit_code == 0;
    if (!served) SleepMilliseconds(100);
  }
  EXPECT_TRUE(served) << up.Logs();
}

void ExpectMistake(const std::vector<std::string>& args, int exit_code,
                   const std::string& message) {
  const Completed completed = RunCommand(args, 60);
  EXPECT_EQ(completed.exit_code, exit_code) << testing::PrintToString(args) << completed.err;
  EXPECT_THAT(completed.err, HasSubstr(message)) << testing::PrintToString(args);
}

TEST(Mistakes, UnknownFlagsNameTheNearest) {
  const std::string model = SourcePath("models/demo");
  ExpectMistake({BinaryPath("tandem"), "up", "--model", model, "--max-model-length", "64"}, 2,
                "--max-model-len");
  ExpectMistake({BinaryPath("tandem"), "generat"}, 2, "generate");
  for (const char* program : {"tandem_router", "tandem_prefill_worker", "tandem_decode_worker"}) {
    ExpectMistake({BinaryPath(program), "--model", model, "--metrics-lisen", "x"}, 2,
                  "--metrics-listen");
  }
}

TEST(Mistakes, OutputThatCannotBeWritten) {
  const std::string inspect = BinaryPath("tandem") + " inspect " + SourcePath("models/demo");
  ExpectMistake({"/bin/sh", "-c", inspect + " >/dev/full"}, 1, "No space left");
  // So much that it is written before the end.
  ExpectMistake({"/bin/sh", "-c", "stdbuf -o0 " + inspect + " >/dev/full"}, 1, "No space left");
}

TEST(Mistakes, PortInUse) {
  Up up;
  const std::string port = up.address.substr(up.address.rfind(':') + 1);
  ExpectMistake({BinaryPath("tandem"), "up", "--model", SourcePath("models/demo"), "--port", port},
                1, port);
  ExpectMistake({BinaryPath("tandem_router"), "--model", SourcePath("models/demo"), "--listen",
                 "127.0.0.1:" + port},
                1, "in use");
}

TEST(Mistakes, ModelDirectoryMissing) {
  ExpectMistake({BinaryPath("tandem"), "up", "--model", "/no/such/model"}, 1, "/no/such/model");
  ExpectMistake({BinaryPath("tandem"), "inspect", "/no/such/model"}, 1, "/no/such/model");
  ExpectMistake({BinaryPath("tandem_router"), "--model", "/no/such/model"}, 1, "/no/such/model");
  for (const char* program : {"tandem_prefill_worker", "tandem_decode_worker"}) {
    ExpectMistake({BinaryPath(program), "--model", "/no/such/model", "--router", "127.0.0.1:1"}, 1,
                  "/no/such/model");
  }
}

// A copy of the demo model with one file replaced.
void ExpectBrokenModel(const std::string& file, const std::string& content,
                       const std::string& program, const std::string& message) {
  TempDir dir;
  const std::string model = dir.path() + "/model";
  std::filesystem::copy(SourcePath("models/demo"), model);
  WriteFile(model + "/" + file, content);
  std::vector<std::string> args = {BinaryPath(program), "--model", model};
  if (program != "tandem_router") args.insert(args.end(), {"--router", "127.0.0.1:1"});
  ExpectMistake(args, 1, message);
}

TEST(Mistakes, MalformedModelFiles) {
  const std::string weights = ReadWholeFile(SourcePath("models/demo/model.safetensors"));
  ASSERT_GT(weights.size(), 100'000u);
  for (const char* worker : {"tandem_prefill_worker", "tandem_decode_worker"}) {
    ExpectBrokenModel("config.json", "{", worker, "config.json");
    ExpectBrokenModel("config.json", R"({"architectures": ["MambaForCausalLM"]})", worker,
                      "MambaForCausalLM");
    ExpectBrokenModel("model.safetensors", "", worker, "model.safetensors");
    ExpectBrokenModel("model.safetensors", weights.substr(0, weights.size() / 2), worker,
                      "model.safetensors");
    ExpectBrokenModel("model.safetensors", std::string(8, '\xff') + weights.substr(8), worker,
                      "model.safetensors");
  }
  ExpectBrokenModel("tokenizer.json", "{\"model\": 7}", "tandem_router", "tokenizer.json");
  ExpectBrokenModel("tokenizer.json", "[", "tandem_router", "tokenizer.json");
  ExpectBrokenModel("config.json", "nonsense", "tandem_router", "config.json");
  ExpectBrokenModel("tokenizer_config.json", R"({"chat_template": "{% if surprise %}"})",
                    "tandem_router", "chat_template");
}

}  // namespace
}  // namespace tandem
