// What an operator does with a cluster that `tandem up` runs: takes workers out and in, changes
// their number, stops it; and what is seen of it on a terminal.
#include <signal.h>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/pty.h"

namespace tandem {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// Far beyond what a busy machine needs.
constexpr double kBound = 60;

std::vector<std::string> UpCommand(const std::vector<std::string>& more) {
  std::vector<std::string> args = {BinaryPath("tandem"),      "up",     "--model",
                                   SourcePath("models/demo"), "--port", "0",
                                   "--kv-cache-memory-bytes", "32MiB"};
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

// `tandem up` whose output goes to a pipe.
class Operator : public testing::Test {
 protected:
  void Start(const std::vector<std::string>& more) {
    up_ = Process::Spawn(UpCommand(more), {}, dir_.path() + "/stderr");
    const std::string line = up_->ReadLine(kBound).value_or("");
    ASSERT_THAT(line, testing::StartsWith("ready ")) << Logs();
    address_ = line.substr(6);
  }

  Completed Tell(std::vector<std::string> args) const {
    args.insert(args.begin(), BinaryPath("tandem"));
    args.insert(args.end(), {"--server", address_});
    return RunCommand(args, kBound);
  }

  // Ids of the workers that are ready, and what is wanted.
  json Status() const {
    const json status = json::parse(Tell({"status", "--json"}).out, nullptr, false);
    json out = {{"ready", json::array()}};
    if (!status.is_object()) return out;
    for (const json& worker : status["workers"]) {
      if (worker["state"] == "ready") out["ready"].push_back(worker["worker_id"]);
    }
    out["wanted"] = status.value("wanted", json());
    return out;
  }

  bool WaitForReady(const std::vector<std::string>& ids) const {
    for (int i = 0; i < kBound * 5; ++i) {
      if (Status()["ready"] == json(ids)) return true;
      SleepMilliseconds(200);
    }
    return false;
  }

  std::string Logs() const { return ReadWholeFile(dir_.path() + "/stderr"); }

  TempDir dir_;
  std::unique_ptr<Process> up_;
  std::string address_;
};

TEST_F(Operator, TakesWorkersOutAndIn) {
  Start({"--prefill", "1", "--decode", "2"});
  const Completed out = Tell({"drain", "decode-1", "--stay", "--wait"});
  EXPECT_EQ(out.exit_code, 0) << out.err << Logs();
  EXPECT_THAT(out.out, AllOf(HasSubstr("tandem undrain decode-1"), HasSubstr("has left")));
  const json status = Status();
  EXPECT_EQ(status["ready"], json({"decode-0", "prefill-0"}));
  EXPECT_EQ(status["wanted"], json({{"decode", 1}, {"prefill", 1}}));
  // The process ends a little after it has left.
  std::string shown;
  for (int i = 0; i < kBound * 5; ++i) {
    shown = Tell({"status"}).out;
    if (shown.find("decode-1: held out\n") != std::string::npos) break;
    SleepMilliseconds(200);
  }
  EXPECT_THAT(shown, HasSubstr("decode-1: held out\n"));

  const Completed last = Tell({"drain", "decode-0"});
  EXPECT_EQ(last.exit_code, 1);
  EXPECT_THAT(last.err, AllOf(HasSubstr("last decode worker"), HasSubstr("--force")));

  const Completed in = Tell({"undrain", "decode-1"});
  EXPECT_EQ(in.exit_code, 0) << in.err;
  EXPECT_TRUE(WaitForReady({"decode-0", "decode-1", "prefill-0"})) << Logs();
  EXPECT_THAT(Tell({"undrain", "decode-1"}).err, HasSubstr("not held out"));
}

TEST_F(Operator, ScalesUpAndDownAndStopsWithoutAWarning) {
  Start({"--prefill", "1", "--decode", "1"});
  const Completed more = Tell({"scale", "decode=3", "--wait"});
  EXPECT_EQ(more.exit_code, 0) << more.err << Logs();
  EXPECT_EQ(Status()["ready"], json({"decode-0", "decode-1", "decode-2", "prefill-0"}));
  const Completed fewer = Tell({"scale", "decode=1", "--wait"});
  EXPECT_EQ(fewer.exit_code, 0) << fewer.err << Logs();
  EXPECT_EQ(Status()["ready"], json({"decode-0", "prefill-0"}));
  EXPECT_THAT(Tell({"scale", "decode=0"}).err, HasSubstr("--force"));
  EXPECT_THAT(Tell({"scale", "decode=65"}).err, HasSubstr("at most 64"));
  EXPECT_THAT(Tell({"scale", "router=2"}).err, HasSubstr("prefill, decode or unified"));
  EXPECT_EQ(Tell({"generate", "--prompt", "hello", "--max-tokens", "4"}).exit_code, 0) << Logs();

  up_->Signal(SIGTERM);
  EXPECT_EQ(up_->Wait(kBound), 0) << Logs();
  const std::string logs = Logs();
  const size_t stopping = logs.find("tandem up: stopping, 0 streams to finish");
  ASSERT_NE(stopping, std::string::npos) << logs;
  // Before that a slow machine may have made a worker lose its router for a moment.
  EXPECT_THAT(logs.substr(stopping),
              AllOf(Not(HasSubstr("warn")), Not(HasSubstr("dialling again"))));
}

TEST_F(Operator, AskedAtTheWrongProcessTellsWhomToAsk) {
  Start({"--prefill", "1", "--decode", "1"});
  const json status = json::parse(Tell({"status", "--json"}).out, nullptr, false);
  ASSERT_TRUE(status.is_object());
  const Completed wrong = RunCommand({BinaryPath("tandem"), "status", "--server",
                                      status["workers"][0]["address"].get<std::string>()},
                                     kBound);
  EXPECT_EQ(wrong.exit_code, 1);
  EXPECT_THAT(wrong.err, AllOf(HasSubstr("is worker decode-0; ask its router"),
                               HasSubstr("--server " + address_)));
}

TEST(Failure, IsSaidLastAndOnce) {
  const Completed failed =
      RunCommand(UpCommand({"--prefill", "1", "--decode", "1", "--num-threads", "-3"}), kBound);
  EXPECT_NE(failed.exit_code, 0);
  const std::string cause = "--num-threads";
  const size_t first = failed.err.find(cause);
  ASSERT_NE(first, std::string::npos) << failed.err;
  EXPECT_EQ(failed.err.rfind("\ntandem up: "), failed.err.rfind('\n', first)) << failed.err;
  EXPECT_EQ(failed.err.find('\n', first), failed.err.size() - 1) << failed.err;
}

TEST(UpInATerminal, UpSumsUpInEightyColumns) {
  PtyProcess up(UpCommand({"--prefill", "1", "--decode", "1"}), {}, 80, 24);
  ASSERT_TRUE(up.WaitFor("a second one kills", kBound)) << up.screen().Text();
  EXPECT_THAT(up.screen().Text(),
              AllOf(HasSubstr("ready 127.0.0.1:"), HasSubstr("model        demo ("),
                    HasSubstr("workers      1 prefill, 1 decode\n"), HasSubstr("tandem chat")));
  EXPECT_THAT(up.screen().Text().substr(0, up.screen().Text().find("ready ")),
              Not(HasSubstr(" | ")));
  for (int row = 0; row < 24; ++row) EXPECT_LT(up.screen().Line(row).size(), 80u);
  up.Type("\x03");
  EXPECT_TRUE(up.WaitFor("stopping, 0 streams to finish; Ctrl-C again to kill", kBound))
      << up.screen().Text();
  EXPECT_EQ(up.Wait(kBound), 0) << up.screen().Text();
  EXPECT_THAT(up.screen().Text(), Not(HasSubstr("warn")));
}

TEST(UpInATerminal, ASecondCtrlCKillsAndSaysSo) {
  PtyProcess up(UpCommand({"--unified", "1", "--min-step-ms", "100"}), {}, 80, 24);
  ASSERT_TRUE(up.WaitFor("a second one kills", kBound)) << up.screen().Text();
  const std::string text = up.screen().Text();
  const size_t at = text.find("ready ") + 6;
  const std::string address = text.substr(at, text.find('\n', at) - at);
  const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  grpc::Status status;
  // A minute of tokens, for which a stop waits.
  std::thread stream([&] {
    status = TestClient(channel).Generate(TokenRequest(RandomTokens(8, 500, 1), 600)).status;
  });
  bool runs = false;
  for (int i = 0; i < kBound * 5 && !runs; ++i) {
    const json now = json::parse(
        RunCommand({BinaryPath("tandem"), "status", "--json", "--server", address}, kBound).out,
        nullptr, false);
    runs = now.is_object() && now["running_requests"] == 1;
    if (!runs) SleepMilliseconds(200);
  }
  EXPECT_TRUE(runs);
  up.Type("\x03");
  EXPECT_TRUE(up.WaitFor("stopping, 1 stream to finish", kBound)) << up.screen().Text();
  up.Type("\x03");
  EXPECT_TRUE(up.WaitFor("killed all processes", kBound)) << up.screen().Text();
  EXPECT_EQ(up.Wait(kBound), 130) << up.screen().Text();
  stream.join();
  EXPECT_FALSE(status.ok());
}

}  // namespace
}  // namespace tandem
