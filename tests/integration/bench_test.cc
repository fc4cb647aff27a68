// `tandem bench` against `tandem up` on the demo model: every scenario and every way to send. And
// against another server.
#include <thread>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "httplib.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

using nlohmann::json;
using testing::HasSubstr;

class BenchTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = new TempDir;
    up_ = Process::Spawn(
              {BinaryPath("tandem"), "up", "--model", SourcePath("models/demo"), "--prefill", "1",
               "--decode", "1", "--port", "0", "--kv-cache-memory-bytes", "128MiB",
               // However slow the machine, nobody is told that he would wait too long, and no
               // worker is taken for stuck.
               "--max-wait", "600", "--worker-stalled-after", "60", "--worker-lost-after", "120"},
              {}, dir_->path() + "/stderr")
              .release();
    const auto line = up_->ReadLine(60);
    ASSERT_TRUE(line.has_value() && line->starts_with("ready "))
        << ReadWholeFile(dir_->path() + "/stderr");
    address_ = line->substr(6);
  }
  static void TearDownTestSuite() {
    delete up_;
    delete dir_;
  }

  static Completed Bench(std::vector<std::string> flags) {
    std::vector<std::string> args = {BinaryPath("tandem"), "bench", "--server", address_};
    args.insert(args.end(), flags.begin(), flags.end());
    return RunCommand(args, 120);
  }
  // Runs with --json and expects that many answers.
  static json Measure(std::vector<std::string> flags, int completed) {
    flags.push_back("--json");
    const Completed bench = Bench(flags);
    EXPECT_EQ(bench.exit_code, 0) << bench.err;
    json out = json::parse(bench.out, nullptr, false);
    EXPECT_TRUE(out.is_object()) << bench.out << bench.err;
    if (!out.is_object()) return json::object();
    EXPECT_EQ(out["completed"], completed) << out;
    EXPECT_EQ(out["failed"], 0) << out;
    for (const char* key : {"mean_ttft_ms", "p99_itl_ms", "median_e2el_ms", "output_throughput",
                            "mean_stage_prefill_ms"}) {
      EXPECT_GT(out[key].get<double>(), 0) << key;
    }
    return out;
  }

  static TempDir* dir_;
  static Process* up_;
  static std::string address_;
};

TempDir* BenchTest::dir_ = nullptr;
Process* BenchTest::up_ = nullptr;
std::string BenchTest::address_;

const std::vector<std::string> kShort = {"--random-input-len", "64", "--random-output-len", "8"};

std::vector<std::string> Short(std::vector<std::string> more) {
  more.insert(more.end(), kShort.begin(), kShort.end());
  return more;
}

TEST_F(BenchTest, ClosedLoop) {
  const json out = Measure(Short({"--num-prompts", "20", "--max-concurrency", "4"}), 20);
  EXPECT_EQ(out["total_input_tokens"], 20 * 64);
  EXPECT_EQ(out["total_output_tokens"], 20 * 8);
  EXPECT_EQ(out["max_concurrent_requests"], 4);
  EXPECT_EQ(out["total_cached_tokens"], 0);
}

TEST_F(BenchTest, OpenLoops) {
  const json poisson =
      Measure(Short({"--num-prompts", "20", "--request-rate", "100", "--burstiness", "0.5"}), 20);
  EXPECT_EQ(poisson["request_rate"], 100);
  const json constant =
      Measure(Short({"--num-prompts", "20", "--request-rate", "50", "--arrival", "constant"}), 20);
  EXPECT_GE(constant["duration"].get<double>(), 19 / 50.0);
}

TEST_F(BenchTest, SharedPrefix) {
  const json out = Measure(Short({"--scenario", "shared-prefix", "--prefix-len", "256",
                                  "--num-prompts", "10", "--max-concurrency", "1"}),
                           10);
  EXPECT_EQ(out["total_cached_tokens"], 9 * 256);
}

TEST_F(BenchTest, TwoTurns) {
  const json out = Measure({"--scenario", "two-turn", "--first-tokens", "256", "--second-tokens",
                            "32", "--random-output-len", "16", "--num-prompts", "5"},
                           10);
  EXPECT_GE(out["total_cached_tokens"], 5 * 256);
  // That the second is the shorter one is for a machine that does nothing else.
  EXPECT_GT(out["median_ttft_turn1_ms"], 0);
  EXPECT_GT(out["median_ttft_turn2_ms"], 0);
}

TEST_F(BenchTest, TraceReplay) {
  const json out =
      Measure({"--scenario", "trace", "--trace", SourcePath("tests/data/conversation_trace.jsonl"),
               "--length-scale", "0.0625", "--trace-speed", SanitizerSlowsBy() > 1 ? "2" : "10",
               "--num-prompts", "20"},
              19);                                 // one of them is longer than the model takes
  EXPECT_GE(out["total_cached_tokens"], 10 * 32);  // its first block, 512 tokens, is everybody's
}

TEST_F(BenchTest, StaticBatchesToCompareWith) {
  const json out = Measure(Short({"--num-prompts", "16", "--max-concurrency", "4",
                                  "--compare-static", "--random-range-ratio", "0.9"}),
                           16);
  EXPECT_EQ(out["static_batches_run"]["completed"], 16);
  EXPECT_EQ(out["static_batches_run"]["static_batches"], true);
  EXPECT_EQ(out["static_batches"], false);
}

TEST_F(BenchTest, TextAndFile) {
  const std::string file = dir_->path() + "/result.json";
  const Completed bench =
      Bench(Short({"--num-prompts", "5", "--goodput", "ttft:60000", "tpot:60000", "--result-dir",
                   dir_->path(), "--result-filename", "result.json", "--save-detailed"}));
  EXPECT_EQ(bench.exit_code, 0) << bench.err;
  EXPECT_THAT(bench.out, HasSubstr("Serving Benchmark Result"));
  EXPECT_THAT(bench.out, HasSubstr("Median TTFT (ms):"));
  EXPECT_EQ(bench.err, "");  // no control codes where there is no terminal
  const json saved = json::parse(ReadWholeFile(file));
  EXPECT_EQ(saved["request_goodput"], saved["request_throughput"]);
  EXPECT_EQ(saved["itls"].size(), 5u);
}

TEST_F(BenchTest, Page) {
  const std::string page = dir_->path() + "/bench.html";
  const json out = Measure(Short({"--num-prompts", "10", "--html", page}), 10);
  const std::string html = ReadWholeFile(page);
  for (const char* name : {"completed", "output_throughput", "p99_ttft_ms", "mean_itl_ms"}) {
    EXPECT_THAT(html, HasSubstr(fmt::format("<td>{}</td><td>{}</td>", name, out[name].dump())));
  }
  EXPECT_THAT(html, HasSubstr("<svg"));
}

TEST_F(BenchTest, AnOpenAiServer) {
  httplib::Server server;
  server.Get("/v1/models", [](const httplib::Request&, httplib::Response& response) {
    response.set_content(R"({"data": [{"id": "other"}]})", "application/json");
  });
  server.Post(
      "/v1/chat/completions", [](const httplib::Request& request, httplib::Response& response) {
        const int tokens = json::parse(request.body)["max_tokens"];
        std::string events;
        for (int i = 0; i < tokens; ++i) {
          events += R"(data: {"choices": [{"delta": {"content": " x"}}]})"
                    "\n\n";
        }
        events += R"(data: {"choices": [], "usage": {"prompt_tokens": 70, "completion_tokens": )" +
                  std::to_string(tokens) + "}}\n\ndata: [DONE]\n\n";
        response.set_content(events, "text/event-stream");
      });
  const int port = server.bind_to_any_port("127.0.0.1");
  std::thread thread([&] { server.listen_after_bind(); });
  const Completed bench = RunCommand(
      {BinaryPath("tandem"), "bench", "--api", "openai", "--url",
       fmt::format("http://127.0.0.1:{}/v1", port), "--num-prompts", "20", "--max-concurrency", "4",
       "--random-input-len", "64", "--random-output-len", "8", "--json"},
      120);
  const std::string page = dir_->path() + "/compared.html";
  const json both = Measure(Short({"--num-prompts", "10", "--compare-url",
                                   fmt::format("http://127.0.0.1:{}/v1", port), "--html", page}),
                            10);
  server.stop();
  thread.join();
  EXPECT_EQ(both["backend"], "tandem-grpc");
  EXPECT_EQ(both["compared_run"]["backend"], "openai-chat");
  EXPECT_EQ(both["compared_run"]["completed"], 10);
  EXPECT_EQ(both["compared_run"]["total_output_tokens"], both["total_output_tokens"]);
  EXPECT_THAT(ReadWholeFile(page),
              HasSubstr(fmt::format("<td>median_ttft_ms</td><td>{}</td><td>{}</td>",
                                    both["median_ttft_ms"].dump(),
                                    both["compared_run"]["median_ttft_ms"].dump())));
  ASSERT_EQ(bench.exit_code, 0) << bench.err;
  const json out = json::parse(bench.out);
  EXPECT_EQ(out["backend"], "openai-chat");
  EXPECT_EQ(out["model_id"], "other");
  EXPECT_EQ(out["completed"], 20);
  EXPECT_EQ(out["total_input_tokens"], 20 * 70);
  EXPECT_EQ(out["total_output_tokens"], 20 * 8);
}

TEST_F(BenchTest, Mistakes) {
  const Completed too_long = Bench({"--random-input-len", "100000"});
  EXPECT_EQ(too_long.exit_code, 1);
  EXPECT_THAT(too_long.err, HasSubstr("max_model_len"));
  const Completed no_trace = Bench({"--scenario", "trace"});
  EXPECT_EQ(no_trace.exit_code, 2);
  EXPECT_THAT(no_trace.err, HasSubstr("--trace FILE"));
  const Completed no_limit = Bench({"--num-prompts", "1", "--goodput", "speed:5"});
  EXPECT_EQ(no_limit.exit_code, 1);
  EXPECT_THAT(no_limit.err, HasSubstr("ttft, tpot, e2el"));
  const Completed no_url = Bench({"--api", "openai"});
  EXPECT_EQ(no_url.exit_code, 2);
  EXPECT_THAT(no_url.err, HasSubstr("--url"));
  const Completed nobody = Bench({"--api", "openai", "--url", "http://127.0.0.1:1/v1"});
  EXPECT_EQ(nobody.exit_code, 1);
  EXPECT_THAT(nobody.err, HasSubstr("http://127.0.0.1:1"));
}

TEST_F(BenchTest, RefusalsAreListedByStatus) {
  const Completed bench = Bench(Short({"--num-prompts", "30", "--timeout", "0.003", "--num-warmups",
                                       "0", "--max-concurrency", "30"}));
  EXPECT_THAT(bench.out, HasSubstr("DEADLINE_EXCEEDED:"));
}

}  // namespace
}  // namespace tandem
