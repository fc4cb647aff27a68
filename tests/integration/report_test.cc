// `tandem report` on a cluster that answers.
#include <atomic>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using testing::HasSubstr;

// What follows a panel's title in the text, up to the next title.
std::string LinesOf(const std::string& text, const std::string& title) {
  const size_t begin = text.find("\n  " + title + "\n");
  if (begin == std::string::npos) return "";
  size_t end = begin + 3 + title.size();
  while (text.compare(end, 5, "\n    ") == 0) end = text.find('\n', end + 1);
  return text.substr(begin, end - begin);
}

TEST(Report, OfACluster) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
  spec.decode_flags = {"--local-prefill-max-tokens=0"};
  auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  std::atomic<bool> done = false;
  std::thread traffic([&] {
    TestClient client(cluster->channel());
    for (uint64_t i = 0; !done; ++i) {
      client.Generate(TokenRequest(RandomTokens(60, kDemoVocab, i), 8));
    }
  });
  const TempDir dir;
  const std::string page = dir.path() + "/report.html";
  const Completed report =
      RunCommand({BinaryPath("tandem"), "report", "--metrics", cluster->router().metrics_address,
                  cluster->worker("prefill-0").metrics_address,
                  cluster->worker("decode-0").metrics_address, "--seconds", "5", "--html", page},
                 60);
  done = true;
  traffic.join();
  ASSERT_EQ(report.exit_code, 0) << report.err;
  for (const char* title : {"Time to first token", "Time per output token", "Whole request"}) {
    const std::string lines = LinesOf(report.out, title);
    for (const char* name : {"p50", "p95", "p99"}) EXPECT_THAT(lines, HasSubstr(name)) << title;
  }
  EXPECT_THAT(LinesOf(report.out, "Gap between tokens"), HasSubstr("p99"));
  EXPECT_THAT(LinesOf(report.out, "Bytes per second"), HasSubstr("prefill-0 to decode-0"));
  EXPECT_THAT(report.out, HasSubstr("First token within 1 s"));
  const Completed parsed = RunCommand(
      {"/usr/bin/python3", "-c",
       "import sys,xml.dom.minidom as d\n"
       "page=d.parse(sys.argv[1])\n"
       "print(' '.join(e.firstChild.data for e in page.getElementsByTagName('h2')))\n"
       "print(len(page.getElementsByTagName('polyline')),len(page.getElementsByTagName('rect')))",
       page},
      60);
  ASSERT_EQ(parsed.exit_code, 0) << parsed.err;
  for (const char* row : {"Verdict", "Smoothness", "Prefill workers", "Decode workers",
                          "KV shipping", "Router and prefix cache"}) {
    EXPECT_THAT(parsed.out, HasSubstr(row));
    EXPECT_THAT(report.out, HasSubstr(row));
  }
}

TEST(Report, Mistakes) {
  const auto run = [](std::vector<std::string> more) {
    more.insert(more.begin(), {BinaryPath("tandem"), "report"});
    return RunCommand(more, 60);
  };
  const Completed nothing = run({});
  EXPECT_EQ(nothing.exit_code, 2);
  EXPECT_THAT(nothing.err, HasSubstr("--prometheus"));
  const Completed nobody = run({"--metrics", "127.0.0.1:1", "--seconds", "0.1"});
  EXPECT_EQ(nobody.exit_code, 1);
  EXPECT_THAT(nobody.err, HasSubstr("127.0.0.1:1"));
  const Completed secure = run({"--prometheus", "https://localhost:9090"});
  EXPECT_EQ(secure.exit_code, 1);
  EXPECT_THAT(secure.err, HasSubstr("http://HOST:PORT"));
}

}  // namespace
}  // namespace tandem
